"""The tuners other than LoRA: what each saves of a layer, reads of its config, and needs.

A table, because planning must not import PEFT; tests compare it with the installed one. Formulae
and shapes are those of ``peft/tuners/*/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from merge_core.updates.tuning import Kind, Others

Form = Mapping[str, str]
"""Names of a layer's tensors and their shapes, size by size. A size is a number; ``in`` or ``out``
of the layer; a field of the config; or a name that must mean the same wherever it stands. ``2r``
and ``in/r`` are what they look like."""

COMMON_FIELDS = frozenset({"peft_type", "bias", "modules_to_save", "fan_in_fan_out"})
"""Fields of many tuners; what ``bias`` and ``modules_to_save`` name is trained without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuner:
    """One ``peft_type``."""

    groups: tuple[tuple[Form, ...], ...]
    """Of each group a layer has one form."""
    fields: frozenset[str]
    """Fields of its config that may change the result."""
    copies: int
    """Tensors of the size of a layer's weight that are in memory at once while PEFT merges it, in
    float32; measured, and rounded up."""
    squares: int = 0
    """The same for tensors of [n, n], where n is the layer's larger side."""
    shared: Form = field(default_factory=dict)
    """What belongs to no layer, after ``base_model.``. Its sizes may also be ``widest`` and
    ``tallest``, the largest ``in`` and ``out`` of all layers; ``longer`` is the larger of the two,
    ``shorter`` the other. A name that ends with ``*`` stands for any number of tensors."""
    changes: tuple[str, ...] = ("weight",)
    kinds: frozenset[Kind] = frozenset({Kind.LINEAR})
    others: Others = Others.NONE


def _groups(*groups: str) -> tuple[tuple[Form, ...], ...]:
    """``name: sizes; name: sizes | other form`` for each group."""
    return tuple(tuple(map(_form, group.split("|"))) for group in groups)


def _form(text: str) -> Form:
    pairs = (part.split(":") for part in text.split(";") if part.strip())
    return MappingProxyType({name.strip(): sizes.strip() for name, sizes in pairs})


def _fields(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CONV1D = frozenset({Kind.LINEAR, Kind.CONV1D})
_EMBEDDING = frozenset({Kind.LINEAR, Kind.EMBEDDING})
_ANY = frozenset(Kind)

_BOTH = ("weight", "bias")
_VERA = "r save_projection projection_prng_key d_initial vera_dropout"

TUNERS: Mapping[str, Tuner] = MappingProxyType(
    {
        "ADALORA": Tuner(
            groups=_groups("lora_A: init_r in; lora_B: out init_r; lora_E: init_r 1"),
            fields=_fields(
                "r init_r target_r lora_alpha rank_pattern tinit tfinal deltaT beta1 beta2"
                " orth_reg_weight total_step init_lora_weights"
            ),
            copies=4,
            kinds=_CONV1D,
        ),
        "BEFT": Tuner(
            groups=_groups("beft_bias: 1 out"), fields=_fields(""), copies=2, changes=("bias",)
        ),
        "BOFT": Tuner(
            groups=_groups("boft_R: factors blocks size size; boft_s: out 1"),
            fields=_fields("boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout"),
            copies=3,
            squares=4,
        ),
        "C3A": Tuner(
            groups=_groups("c3a_kernel: out/block_size in/block_size block_size"),
            fields=_fields("block_size block_size_pattern"),
            copies=4,
            squares=4,
        ),
        "DEFT": Tuner(
            groups=_groups("deft_P: out r; deft_R: r in | deft_P: out r"),
            fields=_fields("r decomposition_method init_scale alpha para deft_dropout"),
            copies=5,
            squares=1,
            kinds=_CONV1D,
        ),
        "DELORA": Tuner(
            groups=_groups("delora_A: r in; delora_B: out r; delora_lambda: 1; delora_w_norm: in"),
            fields=_fields("r delora_lambda rank_pattern lambda_pattern module_dropout"),
            copies=4,
        ),
        "FOURIERFT": Tuner(
            groups=_groups("fourierft_spectrum: n_frequency"),
            fields=_fields("n_frequency scaling random_loc_seed n_frequency_pattern"),
            copies=8,
            kinds=_CONV1D,
        ),
        "GLORA": Tuner(
            groups=_groups(
                *(
                    f"{x}.Xd: out r; {x}.Xu: r in | {x}.X: out 1 | {x}.X: 1 | {x}.zeros: out in"
                    for x in ("glora_A", "glora_B")
                ),
                "glora_C.Xd: in r; glora_C.Xu: r 1 | glora_C.X: in 1 | glora_C.zeros: in 1",
                *(f"{x}.X: out | {x}.X: 1 | {x}.zeros: out" for x in ("glora_D", "glora_E")),
            ),
            fields=_fields("r config_A_B config_C config_D_E"),
            copies=7,
            changes=_BOTH,
        ),
        "GRALORA": Tuner(
            groups=_groups(
                "gralora_A: gralora_k in/gralora_k n; gralora_B: gralora_k n out/gralora_k",
                "gralora_A_general.weight: hybrid_r in; gralora_B_general.weight: out hybrid_r |",
            ),
            fields=_fields("r hybrid_r alpha gralora_k gralora_dropout"),
            copies=5,
            kinds=_CONV1D,
        ),
        "HIRA": Tuner(
            groups=_groups(
                "hira_A: r in; hira_B: out r | hira_embedding_A: r in; hira_embedding_B: out r"
            ),
            fields=_fields("r rank_pattern hira_dropout"),
            copies=6,
            kinds=_ANY,
        ),
        "HRA": Tuner(
            groups=_groups("hra_u: in r"), fields=_fields("r apply_GS"), copies=3, squares=4
        ),
        "IA3": Tuner(
            groups=_groups("ia3_l: out 1 | ia3_l: 1 in"),
            fields=_fields("feedforward_modules init_ia3_weights"),
            copies=3,
            changes=_BOTH,
            kinds=_CONV1D,
        ),
        "LOHA": Tuner(
            groups=_groups("hada_w1_a: out r; hada_w1_b: r in; hada_w2_a: out r; hada_w2_b: r in"),
            fields=_fields(
                "r alpha rank_pattern alpha_pattern use_effective_conv2d rank_dropout"
                " module_dropout"
            ),
            copies=5,
        ),
        "LOKR": Tuner(
            groups=_groups(
                "lokr_w1: a b | lokr_w1_a: a r; lokr_w1_b: r b",
                "lokr_w2: out/a in/b | lokr_w2_a: out/a r; lokr_w2_b: r in/b",
            ),
            fields=_fields(
                "r alpha rank_pattern alpha_pattern use_effective_conv2d decompose_both"
                " decompose_factor rank_dropout rank_dropout_scale module_dropout"
            ),
            copies=4,
        ),
        "MISS": Tuner(
            groups=_groups("miss_block: r out | miss_block: out/r r r | miss_block: r mini_r"),
            fields=_fields("r mini_r miss_dropout"),
            copies=4,
            squares=1,
        ),
        "OFT": Tuner(
            groups=_groups(
                "oft_R.weight: blocks elements | oft_embedding_R.weight: blocks elements"
            ),
            fields=_fields(
                "r oft_block_size coft eps block_share use_cayley_neumann num_cayley_neumann_terms"
                " module_dropout"
            ),
            copies=3,
            squares=2,
        ),
        "OSF": Tuner(
            groups=_groups(
                "osf_svd_params.U_low: out low; osf_svd_params.S_low: low;"
                " osf_svd_params.V_low: low in"
            ),
            fields=_fields("effective_rank rank_pattern target_svd_config"),
            copies=8,
            squares=4,
        ),
        "PEANUT": Tuner(
            groups=_groups("peanut_A.weight: r out; peanut_B.weight: out r"),
            fields=_fields("r depth act_fn scaling"),
            copies=5,
        ),
        "PSOFT": Tuner(
            groups=_groups(
                "psoft_R.weight: n | psoft_R.weight: r r",
                "psoft_R.vector_a: r |",
                "psoft_R.vector_b: r |",
            ),
            fields=_fields(
                "r psoft_alpha psoft_dropout ab_svd_init psoft_svd psoft_svd_lowrank_niter"
                " random_seed psoft_orth psoft_mag_a psoft_mag_b use_cayley_neumann"
                " num_cayley_neumann_terms cayley_neumann_eps"
            ),
            copies=8,
            squares=4,
        ),
        "PVERA": Tuner(
            groups=_groups("pvera_lambda_b: out; pvera_lambda_d: 2r"),
            fields=_fields("r save_projection projection_prng_key d_initial pvera_dropout"),
            shared=_form("pvera_A: 2r widest; pvera_B: tallest r"),
            copies=4,
            kinds=_CONV1D,
            others=Others.SHAPES,
        ),
        "RANDLORA": Tuner(
            groups=_groups(
                "randlora_gamma: bases shape; randlora_lambda: r bases",
                "randlora_A: r 1 shorter; randlora_B: longer all_bases r |",
            ),
            fields=_fields(
                "r save_projection projection_prng_key sparse very_sparse randlora_alpha"
                " randlora_dropout"
            ),
            shared=_form("randlora_A: r 1 shorter; randlora_B: longer all_bases r"),
            copies=7,
            kinds=_CONV1D,
            others=Others.SHAPES,
        ),
        "ROAD": Tuner(
            groups=_groups("road_alpha: n; road_theta: n"),
            fields=_fields("variant group_size"),
            copies=3,
            squares=4,
            changes=_BOTH,
        ),
        "SHIRA": Tuner(
            groups=_groups("shira_weight: n; shira_indices: 2 n"),
            fields=_fields("r mask_type random_seed"),
            copies=5,
        ),
        "SUPERTUNING": Tuner(
            groups=_groups("supertuning_values: n; supertuning_indices: n"),
            fields=_fields(
                "sparsity select_top r lora_alpha lora_dropout save_precomputed_indices"
            ),
            copies=4,
        ),
        "TINYLORA": Tuner(
            groups=_groups("tinylora_A: r in; tinylora_B: out r", "tinylora_P: u r r |"),
            fields=_fields(
                "r u weight_tying projection_seed save_projection init_v_bound tinylora_dropout"
            ),
            shared=_form("tinylora_v.*: u"),
            copies=8,
            squares=4,
            others=Others.NUMBER,
        ),
        "UNILORA": Tuner(
            groups=_groups(
                "unilora_indices_A: r in; unilora_indices_B: out r;"
                " unilora_scales_A: r in; unilora_scales_B: out r |"
            ),
            fields=_fields(
                "r proj_seed theta_d_length unilora_dropout init_theta_d_bound save_indices"
            ),
            shared=_form("unilora_theta_d: theta_d_length"),
            copies=4,
            others=Others.ALL,
        ),
        "VBLORA": Tuner(
            groups=_groups(
                "vblora_logits_A: r in/vector_length num_vectors;"
                " vblora_logits_B: out/vector_length r num_vectors |"
                "vblora_logits_A_topk_indices: r in/vector_length topk;"
                " vblora_logits_A_topk_weights: r in/vector_length below_topk;"
                " vblora_logits_B_topk_indices: out/vector_length r topk;"
                " vblora_logits_B_topk_weights: out/vector_length r below_topk"
            ),
            fields=_fields(
                "r num_vectors vector_length topk save_only_topk_weights vblora_dropout"
                " init_vector_bank_bound init_logits_std"
            ),
            shared=_form("vblora_vector_bank: num_vectors vector_length"),
            copies=4,
            kinds=_CONV1D,
        ),
        "VERA": Tuner(
            groups=_groups("vera_lambda_b: out; vera_lambda_d: r"),
            fields=_fields(_VERA),
            shared=_form("vera_A: r widest; vera_B: tallest r"),
            copies=4,
            kinds=_CONV1D,
            others=Others.SHAPES,
        ),
        "WAVEFT": Tuner(
            groups=_groups("waveft_spectrum: n_frequency"),
            fields=_fields(
                "n_frequency scaling wavelet_family use_idwt random_loc_seed n_frequency_pattern"
                " proportional_parameters"
            ),
            copies=6,
            kinds=_CONV1D,
        ),
    }
)
"""Every tuner whose layers PEFT merges, one by one."""

_PROMPTS = "it changes the input, not the weights"
_ROUTED = "its change of the weights depends on the input"

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "ADAMSS": "PEFT needs scikit-learn to build its layers, so no test covers it here",
        "ADAPTION_PROMPT": _PROMPTS,
        "BONE": "PEFT renamed it to MISS in 0.18 and no longer reads it",
        "CARTRIDGE": _PROMPTS,
        "CPT": _PROMPTS,
        "FROD": "its layers depend on the weights of all others, which are never read at once",
        "LILY": "PEFT cannot merge it: layers share what depends on the input",
        "MULTITASK_PROMPT_TUNING": _PROMPTS,
        "POLY": _ROUTED,
        "PREFIX_TUNING": _PROMPTS,
        "PROMPT_TUNING": _PROMPTS,
        "P_TUNING": _PROMPTS,
        "SHADOW": "PEFT cannot merge it: a second model runs beside the first",
        "XLORA": _ROUTED,
    }
)
"""Why the others are refused."""

RUNS_ALONE: Mapping[str, str] = MappingProxyType(
    {
        "sample_at_inference": "its weights are drawn anew for each input",
    }
)
"""Fields that no merge can honour when they are set."""
