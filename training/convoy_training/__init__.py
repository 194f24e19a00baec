"""From labelled images to a published version. Imports TensorFlow only to train and to export."""
