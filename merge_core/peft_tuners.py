"""The tuners other than LoRA: what each saves of a layer, reads of its config, and needs.

A table, because planning must not import PEFT; tests compare it with the installed one. Formulae
and shapes are those of ``peft/tuners/*/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from merge_core.sharing_tuners import SHARING
from merge_core.tuner import CONV1D, EMBEDDING, SLOW, Tuner, groups, words
from merge_core.updates.tuning import Kind, Part

_ANY = frozenset(Kind)

_BOTH: tuple[Part, ...] = ("weight", "bias")

TUNERS: Mapping[str, Tuner] = MappingProxyType(
    {
        **SHARING,
        "ADALORA": Tuner(
            groups=groups(
                "lora_A: init_r in; lora_B: out init_r; lora_E: init_r 1",
                "ranknum: 1 |",  # saved by PEFT before 0.18
            ),
            fields=words(
                "r init_r target_r lora_alpha rank_pattern tinit tfinal deltaT beta1 beta2"
                " orth_reg_weight total_step init_lora_weights"
            ),
            copies=4,
            kinds=CONV1D,
        ),
        "ADAMSS": Tuner(
            groups=groups(
                "adamss_A.{num_subspaces}: rank# n; adamss_B.{num_subspaces}: rows# rank#;"
                " adamss_newB: n affine"
            ),
            fields=words(
                "r num_subspaces subspace_rank use_dynamic_rank svd_threshold random_seed use_asa"
                " asa_target_subspaces asa_importance_beta asa_uncertainty_beta"
                " asa_schedule_exponent init_warmup final_warmup mask_interval"
            ),
            copies=5,
            changes=_BOTH,
            needs="scikit-learn",
            note=SLOW,
        ),
        "BEFT": Tuner(
            groups=groups("beft_bias: 1 out"), fields=words(""), copies=2, changes=("bias",)
        ),
        "BOFT": Tuner(
            groups=groups("boft_R: factors blocks size size; boft_s: out 1"),
            fields=words("boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout"),
            copies=3,
            squares=4,
        ),
        "C3A": Tuner(
            groups=groups("c3a_kernel: out/block_size in/block_size block_size"),
            fields=words("block_size block_size_pattern"),
            copies=6,
            squares=4,
        ),
        "DEFT": Tuner(
            groups=groups("deft_P: out r; deft_R: r in | deft_P: out r"),
            fields=words("r decomposition_method init_scale alpha para deft_dropout"),
            copies=5,
            squares=1,
            kinds=CONV1D,
        ),
        "DELORA": Tuner(
            groups=groups("delora_A: r in; delora_B: out r; delora_lambda: 1; delora_w_norm: in"),
            fields=words("r delora_lambda rank_pattern lambda_pattern module_dropout"),
            copies=4,
        ),
        "FOURIERFT": Tuner(
            groups=groups("fourierft_spectrum: n_frequency"),
            fields=words("n_frequency scaling random_loc_seed n_frequency_pattern"),
            copies=9,
            kinds=CONV1D,
        ),
        "GLORA": Tuner(
            groups=groups(
                *(
                    f"{x}.Xd: out r; {x}.Xu: r in | {x}.X: out 1 | {x}.X: 1 | {x}.zeros: out in"
                    for x in ("glora_A", "glora_B")
                ),
                "glora_C.Xd: in r; glora_C.Xu: r 1 | glora_C.X: in 1 | glora_C.zeros: in 1",
                *(f"{x}.X: out | {x}.X: 1 | {x}.zeros: out" for x in ("glora_D", "glora_E")),
            ),
            fields=words("r config_A_B config_C config_D_E"),
            copies=7,
            changes=_BOTH,
        ),
        "GRALORA": Tuner(
            groups=groups(
                "gralora_A: gralora_k in/gralora_k n; gralora_B: gralora_k n out/gralora_k",
                "gralora_A_general.weight: hybrid_r in; gralora_B_general.weight: out hybrid_r |",
            ),
            fields=words("r hybrid_r alpha gralora_k gralora_dropout"),
            copies=5,
            kinds=CONV1D,
        ),
        "HIRA": Tuner(
            # PEFT 0.21 has its rank_pattern in the config, and overlooks it.
            groups=groups(
                "hira_A: n in; hira_B: out n | hira_embedding_A: n in; hira_embedding_B: out n"
            ),
            fields=words("r rank_pattern hira_dropout"),
            copies=6,
            kinds=_ANY,
        ),
        "HRA": Tuner(groups=groups("hra_u: in r"), fields=words("r apply_GS"), copies=3, squares=4),
        "IA3": Tuner(
            groups=groups("ia3_l: out 1 | ia3_l: 1 in"),
            fields=words("feedforward_modules init_ia3_weights"),
            copies=3,
            changes=_BOTH,
            kinds=CONV1D,
        ),
        "KASA": Tuner(
            groups=groups("lora_A.weight: r in; lora_B.weight: out r; lora_diag: r"),
            fields=words(
                "r lora_alpha use_rslora rank_pattern alpha_pattern init_lora_weights kasa_config"
            ),
            copies=8,
            note=SLOW,
        ),
        "LOHA": Tuner(
            groups=groups("hada_w1_a: out r; hada_w1_b: r in; hada_w2_a: out r; hada_w2_b: r in"),
            fields=words(
                "r alpha rank_pattern alpha_pattern use_effective_conv2d rank_dropout"
                " module_dropout"
            ),
            copies=5,
        ),
        "LOKR": Tuner(
            groups=groups(
                "lokr_w1: a b | lokr_w1_a: a r; lokr_w1_b: r b",
                "lokr_w2: out/a in/b | lokr_w2_a: out/a r; lokr_w2_b: r in/b",
            ),
            fields=words(
                "r alpha rank_pattern alpha_pattern use_effective_conv2d decompose_both"
                " decompose_factor rank_dropout rank_dropout_scale module_dropout"
            ),
            copies=4,
        ),
        "MISS": Tuner(
            groups=groups("miss_block: r out | miss_block: out/r r r | miss_block: r mini_r"),
            fields=words("r mini_r miss_dropout"),
            copies=4,
            squares=1,
        ),
        "OFT": Tuner(
            groups=groups(
                "oft_R.weight: blocks elements | oft_embedding_R.weight: blocks elements"
            ),
            fields=words(
                "r oft_block_size coft eps block_share use_cayley_neumann num_cayley_neumann_terms"
                " module_dropout"
            ),
            copies=3,
            squares=2,
            kinds=EMBEDDING,
        ),
        "OSF": Tuner(
            groups=groups(
                "osf_svd_params.U_low: out low; osf_svd_params.S_low: low;"
                " osf_svd_params.V_low: low in"
            ),
            fields=words("effective_rank rank_pattern target_svd_config"),
            copies=11,
            note=SLOW,
        ),
        "PEANUT": Tuner(
            groups=groups(
                "peanut_A.weight: r out; peanut_B.weight: out r;"
                " peanut_encoders.{depth}.weight: r r; peanut_decoders.{depth}.weight: r r"
            ),
            fields=words("r depth act_fn scaling"),
            copies=5,
        ),
        "PSOFT": Tuner(
            groups=groups(
                "psoft_R.weight: n | psoft_R.weight: r r",
                "psoft_R.vector_a: r |",
                "psoft_R.vector_b: r |",
            ),
            fields=words(
                "r psoft_alpha psoft_dropout ab_svd_init psoft_svd psoft_svd_lowrank_niter"
                " random_seed psoft_orth psoft_mag_a psoft_mag_b use_cayley_neumann"
                " num_cayley_neumann_terms cayley_neumann_eps"
            ),
            copies=8,
            note=f"{SLOW}; it works its basis out of the base again, which may come out"
            " differently on another kind of device than it was trained on",
        ),
        "ROAD": Tuner(
            groups=groups("road_alpha: n; road_theta: n"),
            fields=words("variant group_size"),
            copies=2,
            squares=3,
            changes=_BOTH,
        ),
        "SHIRA": Tuner(
            groups=groups("shira_weight: n; shira_indices: 2 n"),
            fields=words("r mask_type random_seed"),
            copies=5,
        ),
        "SUPERTUNING": Tuner(
            groups=groups(
                "supertuning_values: n; supertuning_indices: n",
                "supertuning_lora_A.weight: r in; supertuning_lora_B.weight: out r |",
            ),
            fields=words("sparsity select_top r lora_alpha save_precomputed_indices"),
            copies=6,
        ),
        "WAVEFT": Tuner(
            groups=groups("waveft_spectrum: n_frequency"),
            fields=words(
                "n_frequency scaling wavelet_family use_idwt random_loc_seed n_frequency_pattern"
                " proportional_parameters"
            ),
            copies=7,
            kinds=CONV1D,
        ),
    }
)
"""Every tuner whose layers PEFT merges, one by one."""


def tuner_of(config: Mapping[str, Any]) -> str:
    """``peft_type``, or ``KASA``: LoRA with a changed base, merged as a tuner of its own."""
    kind = config.get("peft_type")
    return "KASA" if kind == "LORA" and config.get("kasa_config") is not None else str(kind)
