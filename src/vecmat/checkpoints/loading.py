"""load(): a checkpoint as a ``transformers`` model whose linear layers are ``vecmat.Linear``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..errors import CheckpointError
from ..fusing import fuse as fuse_layers
from ..nn import Linear, convert, linear_layers
from ..problem import DTYPE_NAMES
from .gguf import GgufFile
from .quantization import Quantization
from .reading import IncompleteError, Plan, Progress, check_buffers, model_config, skeleton
from .safe import faults_of, inside
from .source import Folder, open_source


def load(path: str | Path, device: Any = None, dtype: torch.dtype | None = None, weights: str | None = None, *,
         fuse: bool = False, progress: Progress | None = None) -> Any:  # fmt: skip
    """The ``transformers`` causal language model of a checkpoint, its linear layers ``vecmat.Linear``, for inference.

    path: a folder with config.json and safetensors (plain, GPTQ, AWQ, compressed-tensors, fp8 blocks, bitsandbytes
    int8, or vecmat's own), or a .gguf file. device: where the weights go, one layer after another; torch's default
    device for None. dtype: of activations and dense weights; for None that of dense ``weights``, else the
    checkpoint's own, bf16 for GGUF. weights: a format to quantise every linear layer to ("int8", "int4:g64:zp"); None
    keeps what the file has: exactly, or as docs/checkpoints.md says. A layer whose weight is tied stays dense. fuse: as
    for ``vecmat.convert``.

    The model is in eval mode and asks for no gradients; ``model.config.quantization_config`` describes it, so that
    ``model.save_pretrained`` writes what ``load`` reads. No code of the checkpoint runs, and nothing is downloaded.
    The memory taken is that of the model and of one layer more. progress: called with (name, done, total).

    Raises ``CheckpointError`` for a checkpoint that is damaged, hostile or of a kind that is not read, naming the
    file; ``ValueError`` or ``TypeError`` for other arguments that are wrong.
    """
    place = torch.device(torch.get_default_device() if device is None else device)
    with open_source(path) as source, models.quiet(lambda done, total: None):
        config, chosen = model_config(source, dtype, weights)
        bare = skeleton(source, copy.deepcopy(config), chosen, buffers=False)
        check_buffers(source, bare)
        try:
            plan = Plan(source, bare, weights)
        except IncompleteError as error:
            model = by_transformers(source, config, bare, error)
            convert(model, weights or DTYPE_NAMES[chosen], progress=progress)
            model.to(place)
        else:
            model = skeleton(source, config, chosen, buffers=True)
            _fill(model, plan, place, progress)
        _finish(model, source)
    if fuse:
        fuse_layers(model)
    return model


def by_transformers(source: Folder | GgufFile, config: Any, bare: Any, why: IncompleteError) -> Any:
    """The model as transformers itself loads it, which knows other names and fuses experts; dense weights only.

    bare: its skeleton. Raises ``why`` where that cannot help, because layers are quantised or the file holds less than
    half of the model, and ``IncompleteError`` where it does not.
    """
    from transformers import AutoModelForCausalLM

    needed = sum(parameter.numel() for parameter in bare.parameters())
    if isinstance(source, GgufFile) or source.quantised or 2 * source.elements < needed:
        raise why
    with faults_of(source.where):
        model, told = AutoModelForCausalLM.from_pretrained(
            source.where, config=config, dtype=bare.dtype, local_files_only=True, trust_remote_code=False,
            use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
    bad = sorted(map(str, (*told["missing_keys"], *told["mismatched_keys"])))
    if bad:
        raise IncompleteError(f"{source.where}: has no {bad[0]} that fits ({len(bad)} such tensors)") from why
    return model.eval()


def _fill(model: nn.Module, plan: Plan, device: torch.device, progress: Progress | None) -> None:
    """Put every tensor of a plan where it belongs, and tie what is tied."""
    for done, (name, value) in enumerate(plan.entries(), 1):
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(value, Linear):
            setattr(owner, last, value.to(device))
        else:
            _set(owner, last, value.to(device))
        if progress is not None:
            progress(name, done, plan.total)
    for target, origin in plan.tied.items():
        parent, _, last = target.rpartition(".")
        _set(model.get_submodule(parent), last, model.get_parameter(origin))
    for name, layer in linear_layers(model).items():  # the tied ones
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Linear.from_linear(layer))
    for module in model.modules():  # those that the model computed for itself
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _set(owner: nn.Module, name: str, tensor: Tensor) -> None:
    if name in owner._parameters:
        held = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        owner._parameters[name] = held
    else:
        owner._buffers[name] = tensor


def _finish(model: Any, source: Folder | GgufFile) -> None:
    model.requires_grad_(False)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise CheckpointError(f"{source.where}: nothing was found for {left[0]} ({len(left)} such tensors)")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    described = Quantization.of(
        {name: layer.format for name, layer in layers.items()},
        [name for name, layer in layers.items() if layer.weight_order is not None],
    )
    if described is not None:
        model.config.quantization_config = described.as_dict()
    folder = source.path if isinstance(source, Folder) else None
    if folder is not None and (folder / "generation_config.json").exists():
        from transformers import GenerationConfig

        with faults_of(str(inside(folder, "generation_config.json"))):
            model.generation_config = GenerationConfig.from_pretrained(source.where, local_files_only=True)
