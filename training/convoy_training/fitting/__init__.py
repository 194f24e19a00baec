"""Builds the network and trains it.

Public names: `loop.fit`, `loop.Fitted`, `loop.Epoch`, `devices.prepare`, `devices.TrainingFailed`,
`networks.build`. `loop` trains; `feeder` hands it images, changed by `augmentation`; `checkpoint` keeps what
a killed run needs; `devices` finds the devices and other machines.
Callers: `pipeline` alone. The package imports TensorFlow, so callers load it only when they train.
"""
