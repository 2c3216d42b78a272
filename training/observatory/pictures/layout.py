"""Places in the plane for keys: by principal axes, or by UMAP (McInnes et al. 2018, arXiv:1802.03426).

Arrays in, arrays out: reads no records, and draws nothing.

N points, E experts, D directions that keys are noted on.
"""

from __future__ import annotations

import warnings

import numpy as np

from living_moe.training.observatory.vitals_log import Array

#: Fewest keys of a layer that UMAP is asked to lay out; below, neighbourhoods of its size mean nothing.
FEWEST_FOR_UMAP = 16


def flat_layout(keys_ED: Array, *, umap: bool) -> tuple[Array, str]:
    """Places in the plane, (E, 2), for keys, and how they were found: "UMAP" where wanted and possible, or "PCA"."""
    if umap and len(keys_ED) >= FEWEST_FOR_UMAP:
        from umap import UMAP  # type: ignore[import-not-found,import-untyped,unused-ignore]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own dependencies, about threads and graphs
            reducer = UMAP(n_neighbors=min(15, len(keys_ED) - 1), random_state=0, n_jobs=1)
            return np.asarray(reducer.fit_transform(keys_ED), np.float64), "UMAP"
    return keys_ED @ principal_axes(keys_ED) - keys_ED.mean(0) @ principal_axes(keys_ED), "PCA"


def principal_axes(points_ND: Array) -> Array:
    """The two directions of most variance, (D, 2), each with its largest entry above 0."""
    centred_ND = points_ND - points_ND.mean(0)
    _, vectors_DD = np.linalg.eigh(centred_ND.T @ centred_ND)
    axes_D2 = vectors_DD[:, ::-1][:, :2]
    if axes_D2.shape[1] < 2:
        axes_D2 = np.concatenate([axes_D2, np.zeros_like(axes_D2)], axis=1)
    signs: Array = np.sign(axes_D2[np.abs(axes_D2).argmax(0), [0, 1]])
    return axes_D2 * np.where(signs == 0, 1.0, signs)
