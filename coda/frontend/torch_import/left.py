"""One table: operators that stay torch's -> why. Reports quote it, docs/models.md shows it.

Names are ATen's, others begin with their namespace. A name may end in `*`; of several names that
fit, the longest counts.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

_ROWS: tuple[tuple[str, str], ...] = (
    (
        "torch has a kernel of its own for it",
        "scaled_dot_product_attention _scaled_dot_product_* _flash_attention_* _native_multi_head* "
        "_efficient_attention_* lstm* gru* rnn_* quantized_* _thnn_* _scaled_mm* _grouped_mm* "
        "torch_nn._linear_cross_entropy_*",
    ),
    (
        "it draws random numbers",
        "bernoulli* rand* normal* uniform* cauchy* exponential* geometric* log_normal* "
        "multinomial* native_dropout rrelu* poisson binomial* _sample_dirichlet _standard_gamma",
    ),
    (
        "the size of its result depends on values",
        "nonzero* masked_select argwhere unique* _unique* bincount repeat_interleave.Tensor "
        "allclose equal item _local_scalar_dense",
    ),
    (
        "it sorts, or searches in what is sorted",
        "sort* argsort* topk* kthvalue* median* nanmedian* mode* quantile* nanquantile* msort "
        "searchsorted* bucketize* histc histogram* _histogramdd*",
    ),
    (
        "it adds to elements, or writes them, at places that are values",
        "scatter* index_add* index_put* _index_put* index_fill* index_copy* index_reduce* "
        "masked_scatter* put _unsafe_index* _unsafe_masked_index* segment_reduce "
        "as_strided_scatter max_unpool* embedding_bag* _embedding_bag*",
    ),
    (
        "it gathers rows of an embedding, which torch does before any product",
        "embedding embedding_renorm*",
    ),
    (
        "it is a scan of other functions than sums",
        "cumprod* cummax* cummin* logcumsumexp* _cummax* _cummin* _logcumsumexp*",
    ),
    (
        "it solves equations of matrices, or factorises them",
        "cholesky* geqrf lu_* ormqr orgqr qr svd* triangular_solve _linalg_* linalg_inv* "
        "linalg_lu* linalg_qr linalg_svd* linalg_eig* linalg_cholesky* linalg_lstsq linalg_ldl* "
        "linalg_pinv* linalg_matrix_exp linalg_householder* linalg_solve* _lu_with_info "
        "linalg_matrix_rank* linalg_tensorinv linalg_tensorsolve linalg_matrix_norm.str_ord",
    ),
    (
        "complex numbers are torch's",
        "fft_*fft fft_*fft2 fft_*fftn _fft_* stft istft complex polar view_as_complex view_as_real "
        "real imag angle conj* _conj* resolve_conj resolve_neg chalf",
    ),
    (
        "it reads windows of neighbours: convolutions, pools and images are torch's",
        "conv* _convolution* convolution* thnn_conv* slow_conv* max_pool* avg_pool* "
        "adaptive_max_pool* _adaptive_* fractional_max_pool* upsample_* _upsample_* "
        "grid_sampler* unfold* im2col col2im as_strided* affine_grid* reflection_pad* "
        "replication_pad* cudnn_* mkldnn_* miopen_*",
    ),
    (
        "it keeps statistics between calls",
        "batch_norm _batch_norm* native_batch_norm* _native_batch_norm* instance_norm",
    ),
    (
        "it is a special function, for which there is no kernel",
        "digamma lgamma mvlgamma polygamma igamma* i0* special_bessel_* special_airy_ai "
        "special_chebyshev_* special_hermite_* special_laguerre_* special_legendre_* "
        "special_modified_* special_scaled_* special_shifted_* special_spherical_* special_i0e "
        "special_i1* special_polygamma special_zeta special_erfcx special_log_ndtr special_ndtri "
        "nextafter frexp* erfinv",
    ),
    (
        "it computes with whole numbers or their bits",
        "gcd lcm bitwise_left_shift* bitwise_right_shift* hash_tensor count_nonzero* isin "
        "tril_indices triu_indices",
    ),
    (
        "it makes a table out of nothing, which torch does once, before the block",
        "arange* linspace* logspace* eye* empty* new_empty* scalar_tensor range*",
    ),
    (
        "it writes to a tensor",
        "detach_ zero_ copy_ set_* resize* clamp_min_ add_*",
    ),
    (
        "it moves a tensor to another device or layout",
        "to.device to_sparse* _to_sparse* sparse_* to_dense*",
    ),
    (
        "it takes or makes a diagonal",
        "diag diag_embed* diagonal* trace block_diag",
    ),
    (
        "its derivative at the ends of its range is torch's own",
        "binary_cross_entropy special_entr",
    ),
    ("it skips NaN in a sum", "nansum nanmean"),
    (
        "it is a norm of groups of channels, or returns its statistics; `layer_norm` is taken",
        "group_norm native_group_norm native_layer_norm",
    ),
    (
        "it multiplies vectors of three elements, or three tensors at once",
        "cross linalg_cross bilinear _trilinear",
    ),
    ("it adds the products of a batch; `baddbmm` and then `sum` are taken", "addbmm"),
    (
        "it takes distances of rows, or bounds their norms",
        "cdist _cdist_forward _euclidean_dist pdist _pdist_forward renorm",
    ),
    (
        "it is a loss of margins between classes or vectors",
        "cosine_embedding_loss soft_margin_loss multi_margin_loss multilabel_margin_loss*",
    ),
    ("it rounds to decimal digits; `round` is taken", "round.decimals"),
    ("it gives 0 for a row of -inf alone; `softmax` is taken", "_safe_softmax"),
    ("it copies chunks into one buffer, to be sent to other devices", "_chunk_cat"),
    ("it belongs to a backward", "*_backward *_backward_data"),
)  # fmt: skip


def rows() -> list[tuple[str, list[str]]]:
    """(reason, names) of each row, in order."""
    return [(why, names.split()) for why, names in _ROWS]


@lru_cache(maxsize=4096)
def why_left(target: Any) -> str:
    """Why an operator stays torch's; "" if the table does not say."""
    space = getattr(target, "namespace", "")
    name = str(target).removeprefix("aten.").removesuffix(".default")
    packet = name.partition(".")[0] if space == "aten" else ""
    found = [
        (len(pattern), why)
        for why, names in rows()
        for pattern in names
        if (space == "aten" or pattern.startswith(f"{space}."))
        and (fnmatchcase(name, pattern) or fnmatchcase(packet, pattern))
    ]
    return max(found, default=(0, ""))[1]
