"""Convoy's own client: python ours.py localhost:8001 digits 3.png ..."""

import sys
from pathlib import Path

from convoy import Classifier

server, model, *names = sys.argv[1:]
with Classifier(server, model=model) as classifier:
    for name, prediction in zip(names, classifier.classify_many(map(Path, names)), strict=True):
        print(name, prediction.label, f"{prediction.probability:.4f}")
