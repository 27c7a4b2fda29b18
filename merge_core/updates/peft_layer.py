"""PEFT's own layer around one weight: built, loaded, merged. The only module that imports peft.

The layer sits at its own path in an otherwise empty model, so that PEFT resolves the config's
patterns as it does in the real one. Other layers that it must see have shapes, but no values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from merge_core.errors import InputError, refuse, some_of
from merge_core.stores.location import Location
from merge_core.updates.tuning import Kind, Layer, Tuning

State = Mapping[str, torch.Tensor]

_MODULE = "base_model.model."
"""Before the path of a module, in the names of an adapter's tensors."""

_SHARED = "base_model."
"""Before the names of what all layers share."""

_OTHER_CONFIG = "Use the adapter_config.json that was saved with these weights"

_PEFT_REFUSES = (ValueError, LookupError, TypeError, AttributeError, ImportError)
_TORCH_REFUSES = ("loading state_dict", "out of bounds")
"""What is raised where config and tensors do not fit; other RuntimeErrors may be lack of memory."""


def merge_layer(
    tuning: Tuning, layer: Layer, held: State, base: State, adapter: Location
) -> dict[str, torch.Tensor]:
    """What PEFT makes of the tensors of one layer.

    Args:
        held: the adapter's tensors for this layer, and those that all layers share, by name.
        base: ``weight`` and, if the layer has one, ``bias``; float32, on one device. May be
            changed in place.
        adapter: its folder, for messages.

    Raises:
        InputError: PEFT refuses the adapter, or expects other tensors of it.
    """
    at = f"{adapter}, module {layer.path}"
    if peft.__version__ != tuning.peft:
        what = f"PEFT is {peft.__version__} on this machine, and {tuning.peft} where it was planned"
        raise refuse(what, at, "Install the same PEFT on every machine")
    _check_places(layer, held, at)
    try:
        with torch.no_grad(), _left_alone(base["weight"].device):
            root = _model(tuning, layer, base)
            model = PeftModel(root, _config(tuning, layer, held, at))
            _load(model, tuning, layer, held, at)
            merged = _merged(model, layer, at)
    except InputError:
        raise
    except (*_PEFT_REFUSES, RuntimeError) as error:
        known = isinstance(error, (*_PEFT_REFUSES, NotImplementedError))
        if not known and not any(sign in str(error) for sign in _TORCH_REFUSES):
            raise
        what = f"PEFT cannot merge it ({type(error).__name__}: {error})"
        raise refuse(what, at, "Check that config and weights belong together") from error
    return {part: getattr(merged, part).detach().float() for part in base}


def _check_places(layer: Layer, held: State, at: str) -> None:
    """Sparse tensors write wherever they point, some count from the end, and a GPU ends the whole
    process at a place that is not there.
    """
    for name, places in held.items():
        sizes = _sizes(name.rpartition(".")[2], layer, held)
        if sizes is None:
            continue
        behind = torch.tensor(sizes, device=places.device).unsqueeze(1)
        listed = places.reshape(len(sizes), -1)
        if bool(((listed < 0) | (listed >= behind)).any()):
            raise refuse(f"{name!r} names places outside of {list(sizes)}", at, _OTHER_CONFIG)


def _sizes(part: str, layer: Layer, held: State) -> tuple[int, ...] | None:
    """Of what the numbers of a tensor are places in, one a row of them; None if they are none."""
    if part == "shira_indices":
        return layer.shape
    if part == "supertuning_indices":
        return (math.prod(layer.shape),)
    if part in ("vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"):
        return (len(held[f"{_SHARED}vblora_vector_bank"]),)
    if part in ("unilora_indices_A", "unilora_indices_B"):
        return (len(held[f"{_SHARED}unilora_theta_d"]),)
    return None


@contextlib.contextmanager
def _left_alone(device: torch.device) -> Iterator[None]:
    """Keep the process's random numbers, and use the same ones for every layer.

    What PEFT warns of is checked here, or of the training.
    """
    gpus = [device] if device.type == "cuda" else []
    with warnings.catch_warnings(), torch.random.fork_rng(gpus):
        warnings.simplefilter("ignore")
        # torch.manual_seed would begin those of the other GPUs anew, which are not kept.
        for generator in (torch.default_generator, *map(_generator_of, gpus)):
            generator.manual_seed(0)
        yield


def _generator_of(gpu: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[gpu.index]


def _model(tuning: Tuning, chosen: Layer, base: State) -> nn.Module:
    root = nn.Module()
    for layer in tuning.around(chosen):
        *outer, last = layer.path.split(".")
        parent = root
        for name in outer:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        tensors = base if layer == chosen else _shape_alone(layer, base["weight"].device)
        parent.add_module(last, _module_of(layer, tensors))
    return root


def _module_of(layer: Layer, tensors: State) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = _class_of(layer)
    for part, tensor in tensors.items():
        setattr(module, part, nn.Parameter(tensor, requires_grad=False))
    return module


def _class_of(layer: Layer) -> nn.Module:
    rows, width = layer.shape
    if layer.kind == Kind.EMBEDDING:
        return nn.Embedding(rows, width)
    if layer.kind == Kind.CONV1D:
        module: nn.Module = Conv1D(width, rows)
        return module
    return nn.Linear(width, rows, bias=layer.bias)


def _shape_alone(layer: Layer, device: torch.device) -> State:
    """Tensors that take no memory: every element is the same one. PEFT moves what layers share to
    the device of each of them, so it cannot be the meta device.
    """
    zero = torch.zeros((), device=device)
    rows = layer.shape[1 if layer.kind == Kind.CONV1D else 0]
    return {
        "weight": zero.expand(layer.shape),
        **({"bias": zero.expand(rows)} if layer.bias else {}),
    }


def _config(tuning: Tuning, layer: Layer, held: State, at: str) -> PeftConfig:
    """The adapter's config, for a model of one layer or a few."""
    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(tuning.config["peft_type"])
    if kind is None:
        what = f"PEFT {tuning.peft} does not know peft_type {tuning.config['peft_type']}"
        raise refuse(what, at, "Install a newer PEFT, on every machine")
    known = {field.name for field in dataclasses.fields(kind)}
    fields: dict[str, Any] = {k: v for k, v in tuning.config.items() if k in known}
    if left := [name for name, value in tuning.config.items() if name not in known and value]:
        what = f"PEFT {tuning.peft} does not know the field {some_of(left)}"
        raise refuse(what, at, "Install the PEFT that the adapter was trained with, if it is newer")
    fields |= {name: value for name, value in _OURS.items() if name in known}
    if not fields.get("feedforward_modules"):  # these are among the names of the others
        fields["target_modules"] = [one.path for one in tuning.around(layer)]
        fields |= {name: None for name in _NARROWING if name in known}
    if tuning.config["peft_type"] == "ADALORA" and fields.get("rank_pattern"):
        # By the names of tensors, all of which must be there.
        fields["rank_pattern"] = {
            name: kept
            for name, kept in fields["rank_pattern"].items()
            if name.startswith(f"{layer.path}.")
        }
    if tuning.config.get("proportional_parameters"):  # of WAVEFT: its share among all layers
        fields["n_frequency"] = len(held[f"{_MODULE}{layer.path}.waveft_spectrum"])
    return kind(**fields)


_OURS = {"inference_mode": True, "bias": "none", "modules_to_save": None}
"""What the last two name was trained without the tuner, and is in the base already."""

_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Not needed where the layers are listed one by one."""


def _merged(model: PeftModel, layer: Layer, at: str) -> nn.Module:
    """This layer alone: the others have no memory that could be written to."""
    tuned = model.get_base_model().get_submodule(layer.path)
    if not isinstance(tuned, BaseTunerLayer):
        raise refuse("the config does not say that it was trained", at, _OTHER_CONFIG)
    tuned.merge()
    merged: nn.Module = tuned.get_base_layer()
    return merged


def _load(model: PeftModel, tuning: Tuning, layer: Layer, held: State, at: str) -> None:
    """Load the layer's tensors: all that PEFT would save, and none that it does not know."""
    model.eval()  # some draw random numbers otherwise
    if tuning.config["peft_type"] == "ADAMSS":
        _check_clusters(get_peft_model_state_dict(model), held, at)
    loaded = set_peft_model_state_dict(model, dict(held))
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    module = f"{_MODULE}{layer.path}."
    wanted = {name for name in saved if name.startswith(module) or not name.startswith(_MODULE)}
    # What all share may be saved with each layer as well.
    wanted -= {f"{module}{name.removeprefix(_SHARED)}" for name in held}
    remedy = "Save the adapter again with PEFT"
    if missing := sorted(wanted - held.keys()):
        raise refuse(f"PEFT needs {some_of(missing)}, which the file lacks", at, remedy)
    if unknown := loaded.unexpected_keys:
        raise refuse(f"PEFT does not know {some_of(unknown)}", at, remedy)


def _check_clusters(built: State, held: State, at: str) -> None:
    """ADAMSS clusters the rows of a layer by a decomposition of the base, and the file does not say
    which rows are in which cluster: PEFT works it out again, and takes factors of other sizes
    without a word. The decomposition is in the file: if it is another one, so are the clusters.
    """
    remedy = "Give the base that it was trained on, and merge on the same kind of device"
    for name, tensor in built.items():
        if name not in held:
            continue
        if tensor.shape != held[name].shape:
            what = f"{name} is {list(held[name].shape)}, and PEFT makes {list(tensor.shape)}"
            raise refuse(f"{what} of this base", at, remedy)
        if name.endswith("_newB") and not torch.allclose(tensor, held[name].to(tensor), atol=_BF16):
            raise refuse(f"{name} is not what PEFT makes of this base", at, remedy)


_BF16 = 2.0**-7
"""What is in the file was rounded to the base's dtype: twice bfloat16's error below 1."""
