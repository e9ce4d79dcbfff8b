"""Map response representations by t-SNE to see whether the halves lie apart.

An example's representation is the mean, over its response tokens, of the hidden state that the LM
head reads to predict the token: the last layer's, after the final norm. Legend: S examples, D
hidden size.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sftmix.report.drawing import Picture, draw, legend_above, subset_colours

if TYPE_CHECKING:  # an optional extra
    from matplotlib.axes import Axes

NEIGHBOURS = 10
FEWEST = 2 * NEIGHBOURS
SEED = 0


def places_of(representations: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return t-SNE's map (S, 2) from a fixed seed, of perplexity 30 or less for few examples.

    Raises:
        ValueError: too few examples, or representations that are not finite.
        ImportError: scikit-learn is not installed.
    """
    number = len(representations)
    if number < FEWEST:
        raise ValueError(f"t-SNE needs at least {FEWEST} examples, there are {number}")
    if not np.isfinite(representations).all():
        raise ValueError("representations are not finite")
    try:
        from sklearn.manifold import TSNE  # an optional extra
    except ImportError as error:
        raise ImportError("t-SNE needs scikit-learn: pip install scikit-learn") from error
    tsne = TSNE(perplexity=min(30.0, (number - 1) / 3), init="pca", random_state=SEED)
    with warnings.catch_warnings():
        # Its start divides by a spread, which is zero if all examples are alike.
        warnings.simplefilter("ignore", RuntimeWarning)
        found: NDArray[np.float32] = tsne.fit_transform(representations)
    return found


def own_neighbours(representations: NDArray[np.float32], subset: NDArray[np.str_]) -> float:
    """Return the share of an example's nearest neighbours (in all D) that are of its own subset."""
    from sklearn.neighbors import NearestNeighbors  # an optional extra

    # Among the finder's own examples, no example is its own neighbour.
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(representations).kneighbors()[1]
    return float((subset[nearest] == subset[:, None]).mean())


def by_chance(subset: NDArray[np.str_]) -> float:
    """Return the average of `own_neighbours` if subsets were dealt out at random."""
    number = len(subset)
    counts = np.unique(subset, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (number * (number - 1)))


def places_picture(
    name: str,
    representations: NDArray[np.float32],  # (S, D)
    places: NDArray[np.float32],  # (S, 2)
    subset: NDArray[np.str_],  # (S,)
) -> Picture:
    """Draw the map of representations, coloured by half or level."""

    def plot(axes: Axes) -> None:
        for half, colour in subset_colours(subset.tolist()).items():
            rows = subset == half
            axes.scatter(
                places[rows, 0],
                places[rows, 1],
                s=6,
                color=colour,
                alpha=0.7,
                linewidths=0,
                label=half,
                rasterized=True,  # the file's size does not grow with the data
            )
        axes.grid(False)
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        axes.set_xlabel("t-SNE 1 (no unit)")
        axes.set_ylabel("t-SNE 2 (no unit)")
        legend_above(axes, columns=3, markerscale=2.5)

    own = 100 * own_neighbours(representations, subset)
    chance = 100 * by_chance(subset)
    return Picture(
        f"Representations of the responses: {name}",
        f"t-SNE (seed {SEED}) of {len(places):,} training examples: the mean over the response "
        "tokens of the hidden state that the LM head reads. Distances between far points and the "
        f"two directions mean nothing. In all {representations.shape[1]:,} dimensions "
        f"{own:.0f} % of an example's {NEIGHBOURS} nearest neighbours are of its own half or "
        f"level; by chance {chance:.0f} %.",
        f"Scatter plot of {len(places):,} examples by t-SNE, coloured by half or level; "
        f"{own:.0f} % of nearest neighbours are of the same one, by chance {chance:.0f} %.",
        draw(f"places {name}", plot, height=3.8),
    )
