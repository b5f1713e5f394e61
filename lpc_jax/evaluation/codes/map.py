"""Maps z onto a plane by t-SNE (van der Maaten & Hinton 2008; extra ``eval``)."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from jaxtyping import Float

from lpc_jax.errors import UserError

# t-SNE takes about a minute for this many; a picture cannot show more of them.
MAPPED = 3000
FEWEST_MAPPED = 5  # fewer have no neighbourhoods to keep
# van der Maaten & Hinton 2008, section 2, call 5 to 50 typical; scikit-learn's default.
_NEIGHBOURS = 30.0


def require() -> Any:
    """Imports ``sklearn.manifold``; raises ``UserError`` if it is not installed."""
    try:
        return importlib.import_module("sklearn.manifold")
    except ModuleNotFoundError as error:
        raise UserError(
            "--codes needs the package 'scikit-learn' for its map of z, which is not"
            " installed. Run: pip install 'lpc-jax[eval]'."
        ) from error


def neighbours(points: int) -> float:
    """t-SNE's perplexity: at most a third of a point's neighbours."""
    return min(_NEIGHBOURS, (points - 1) / 3)


def draw(
    vectors: Float[np.ndarray, "prompts D"], *, seed: int
) -> Float[np.ndarray, "prompts 2"] | None:
    """Coordinates of z on the map; None for too few prompts or a single z."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    spread = centred.std()
    if len(vectors) < FEWEST_MAPPED or spread < 1e-6 * np.abs(vectors).max():
        return None
    sne = require().TSNE(
        perplexity=neighbours(len(vectors)),
        # PCA of a one-dimensional z has no second component to start from.
        init="pca" if vectors.shape[1] > 1 else "random",
        random_state=seed,
    )
    # One thread: with more, the order of sums and so the map depend on the machine, and
    # threads wait for each other in a thousand short steps.
    with importlib.import_module("threadpoolctl").threadpool_limits(1):
        # Unit scale, because the search for each point's bandwidth starts at 1.
        return np.asarray(sne.fit_transform(centred / spread), np.float64)


def places(
    vectors: Float[np.ndarray, "prompts D"], *, seed: int
) -> list[tuple[float, float] | None]:
    """Each prompt's place on the map; above ``MAPPED`` a random subset has one."""
    mapped = np.arange(len(vectors))
    if len(vectors) > MAPPED:
        rng = np.random.default_rng(seed)
        mapped = np.sort(rng.choice(len(vectors), MAPPED, replace=False))
    on_map: list[tuple[float, float] | None] = [None] * len(vectors)
    drawn = draw(vectors[mapped], seed=seed)
    if drawn is not None:
        for i, (x, y) in zip(mapped, drawn.tolist(), strict=True):
            on_map[i] = x, y
    return on_map
