"""Creates sdcli/assets/digits/digits.npz from scikit-learn's copy of the UCI handwritten digits.

    python benchmarks/make_digits.py        # from the project's root; needs scikit-learn

The result is always the same file: see sdcli/assets/digits/README.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

SEED = 0
TEST_FRACTION = 0.2


def main() -> None:
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    # RandomState, because numpy guarantees that its stream never changes.
    random = np.random.RandomState(SEED)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        rows = random.permutation(np.flatnonzero(labels == label))
        is_test[rows[: round(TEST_FRACTION * len(rows))]] = True
    path = Path(__file__).parents[1] / "sdcli" / "assets" / "digits" / "digits.npz"
    np.savez_compressed(
        path,
        train_images=images[~is_test],
        train_labels=labels[~is_test],
        test_images=images[is_test],
        test_labels=labels[is_test],
    )
    print(f"{path}: {(~is_test).sum()} training and {is_test.sum()} test images, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
