"""The tuners whose layers share tensors, of which each layer's own only say what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from merge_core.tuner import CONV1D, EMBEDDING, SLOW, Tuner, form, groups, words
from merge_core.updates.tuning import Others

SHARING: Mapping[str, Tuner] = MappingProxyType(
    {
        "PVERA": Tuner(
            groups=groups("pvera_lambda_b: out; pvera_lambda_d: 2r"),
            fields=words(
                "r save_projection projection_prng_key d_initial pvera_dropout generator_seed"
                " sample_at_inference"
            ),
            shared=form("pvera_A: 2r widest; pvera_B: tallest r"),
            copies=4,
            kinds=CONV1D,
            others=Others.SHAPES,
            notes={
                "sample_at_inference": "PVeRA draws its change of the weights anew for each input;"
                " what is merged is the mean, as PEFT merges it"
            },
        ),
        "RANDLORA": Tuner(
            groups=groups(
                "randlora_gamma: bases least; randlora_lambda: r bases",
                "randlora_A: r 1 shorter; randlora_B: longer all_bases r |",
            ),
            fields=words(
                "r save_projection projection_prng_key sparse very_sparse randlora_alpha"
                " randlora_dropout"
            ),
            shared=form("randlora_A: r 1 shorter; randlora_B: longer all_bases r"),
            copies=7,
            kinds=CONV1D,
            others=Others.SHAPES,
        ),
        "TINYLORA": Tuner(
            groups=groups(
                "tinylora_A: r in; tinylora_B: out r | tinylora_A: r out; tinylora_B: in r",
                "tinylora_P: u r r |",
            ),
            fields=words(
                "r u weight_tying projection_seed save_projection init_v_bound tinylora_dropout"
            ),
            shared=form("tinylora_v.*: u"),
            copies=8,
            kinds=EMBEDDING,
            others=Others.NUMBER,
            note=SLOW,
        ),
        "UNILORA": Tuner(
            groups=groups(
                "unilora_indices_A: r in; unilora_indices_B: out r;"
                " unilora_scales_A: r in; unilora_scales_B: out r |"
            ),
            fields=words(
                "r proj_seed theta_d_length unilora_dropout init_theta_d_bound save_indices"
            ),
            shared=form("unilora_theta_d: theta_d_length"),
            copies=4,
            others=Others.ALL,
        ),
        "VBLORA": Tuner(
            groups=groups(
                "vblora_logits_A: r in/vector_length num_vectors;"
                " vblora_logits_B: out/vector_length r num_vectors |"
                "vblora_logits_A_topk_indices: r in/vector_length topk;"
                " vblora_logits_A_topk_weights: r in/vector_length below_topk;"
                " vblora_logits_B_topk_indices: out/vector_length r topk;"
                " vblora_logits_B_topk_weights: out/vector_length r below_topk"
            ),
            fields=words(
                "r num_vectors vector_length topk save_only_topk_weights vblora_dropout"
                " init_vector_bank_bound init_logits_std"
            ),
            shared=form("vblora_vector_bank: num_vectors vector_length"),
            copies=4,
            kinds=CONV1D,
        ),
        "VERA": Tuner(
            groups=groups("vera_lambda_b: out; vera_lambda_d: r"),
            fields=words("r save_projection projection_prng_key d_initial vera_dropout"),
            shared=form("vera_A: r widest; vera_B: tallest r"),
            copies=4,
            kinds=CONV1D,
            others=Others.SHAPES,
        ),
    }
)
"""By ``peft_type``; part of ``peft_tuners.TUNERS``."""
