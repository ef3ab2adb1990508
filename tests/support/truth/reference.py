"""The paper's method, dense, naive and in float64: the truth that devec is compared with.

Nothing here is shared with devec, and nothing is clever: full matrices, full decompositions.
"""

import numpy as np

RANK_RTOL = 1e-6


def column_projector(W):
    """P = U Uᵀ (Eq. 4), U the left singular vectors of nonzero singular values."""
    U, S, _ = np.linalg.svd(W, full_matrices=False)
    rank = int((S > RANK_RTOL * S[0]).sum()) if S[0] > 0 else 0
    return U[:, :rank] @ U[:, :rank].T


def orthonormal_span(vectors, count):
    """Orthonormal basis of the real span of (possibly complex) vectors."""
    both = np.concatenate([vectors.real, vectors.imag], axis=1)
    return np.linalg.svd(both, full_matrices=False)[0][:, :count]


def chain_basis(deltas, threshold):
    """Eigenvectors of P1 P2 ··· Pk with eigenvalues above the threshold (Eq. 8-10)."""
    product = np.eye(len(deltas[0]))
    for W in deltas:
        product = product @ column_projector(W)
    values, vectors = np.linalg.eig(product)
    chosen = values.real > threshold - 1e-9
    return orthonormal_span(vectors[:, chosen], int(chosen.sum()))


def mean_basis(deltas, threshold):
    """Eigenvectors of the mean projector above (1 + (k-1)√τ)/k."""
    k = len(deltas)
    values, vectors = np.linalg.eigh(sum(column_projector(W) for W in deltas) / k)
    return vectors[:, values > (1 + (k - 1) * np.sqrt(threshold)) / k - 1e-10]


def principal_basis(deltas, threshold):
    """Principal vectors of the first of two subspaces (Theorem 6.1)."""
    first, second = (
        np.linalg.svd(W, full_matrices=False)[0][:, : np.linalg.matrix_rank(W, tol=1e-9)]
        for W in deltas
    )
    Y, cosines, _ = np.linalg.svd(first.T @ second, full_matrices=False)
    return first @ Y[:, cosines**2 > threshold]


BASES = {"chain": chain_basis, "mean": mean_basis, "principal": principal_basis}


def decompose(deltas, threshold, method):
    """Shared (Eq. 12), unique (Eq. 13) and common (Eq. 14) parts of dense deltas."""
    if any(np.abs(W).max() == 0 for W in deltas):
        Z = np.zeros((len(deltas[0]), 0))
    else:
        Z = BASES[method](deltas, threshold)
    shared = [Z @ Z.T @ W for W in deltas]
    unique = [W - S for W, S in zip(deltas, shared, strict=True)]
    norms = [np.linalg.norm(S) for S in shared]
    total = sum(norms) or 1.0
    common = sum(n * S for n, S in zip(norms, shared, strict=True)) / total
    return shared, unique, common, Z


def deflate(target, others, threshold):
    """Iterative scope: remove from the target what it shares with each of the others in turn."""
    rest = target.copy()
    for W in others:
        if np.abs(W).max() == 0 or np.linalg.norm(rest) <= RANK_RTOL * np.linalg.norm(target):
            continue
        Z = chain_basis([rest, W], threshold)
        rest = rest - Z @ Z.T @ rest
    return target - rest, rest


def dora_truth(W, B, A, scaling, m, axis, group=1):
    """ΔW of a DoRA, dense: V = W0 + s·B·A brought to norms m, minus W0."""
    V = W + scaling * B @ A
    if axis == "out":
        return (m / np.linalg.norm(V, axis=1))[:, None] * V - W
    norms = np.sqrt((V**2).sum(0).reshape(-1, group).sum(1))
    return V * np.repeat(m / norms, group) - W
