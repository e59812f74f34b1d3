"""The optimizer's state, to the bit: out of an optimizer into a step, and back.

Keyed by parameter name, so that order does not matter. What the options say (learning rate, betas, weight decay) is not in it:
they may be set anew when a run is resumed, and the run records them itself.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from litlora.checkpoint import names
from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.manifest import TrainingState
from litlora.checkpoint.weights import raw_tensors, safe_open_checked
from litlora.console import counted
from litlora.errors import UserError

OPTIMIZER, VALUES = "optimizer", "values"  # the two parts of what is stored
EXACT = "exact"  # in front of the names of tensors that are not the optimizer's
SEPARATOR = "/"  # between a parameter's name and the name of its state: model...lora_A/exp_avg


def save_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    values: Mapping[str, Any],
    exact: Mapping[str, Tensor],
    *,
    copy: bool = False,
) -> TrainingState:
    """For `commit_step`: the state of every named parameter, and `values`, which JSON must be able to hold.

    `exact`: what the model's own files hold rounded, or not at all, and training needs to the bit. `copy`: as `raw_tensors`.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}{SEPARATOR}{key}"] = value
            else:
                scalars[f"{name}{SEPARATOR}{key}"] = value
    held = sum(len(state) for state in optimizer.state.values())
    assert held == len(tensors) + len(scalars), "the optimizer holds a parameter that has no name"
    own = {"class": type(optimizer).__name__, "parameters": sorted(parameters), "scalars": scalars}
    tensors |= {f"{EXACT}{SEPARATOR}{name}": tensor for name, tensor in exact.items()}
    return TrainingState(tensors=raw_tensors(tensors, copy=copy), values={OPTIMIZER: own, VALUES: dict(values)})


def load_state(
    step: Checkpoint, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], exact: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Put a step's state into `optimizer` and the tensors of `exact`, and return the `values` it was saved with.

    UserError where the state is absent, altered, or of another optimizer or other parameters; the optimizer is then as it was.
    """
    stored = step.training_state()
    own = stored[OPTIMIZER]
    path = step.path / names.TRAINING_STATE
    if own["class"] != type(optimizer).__name__ or own["parameters"] != sorted(parameters):
        here = f"{type(optimizer).__name__} for these {len(parameters)}"
        what = f"was saved by {own['class']} for {counted(len(own['parameters']), 'parameter')}, not by {here}"
        raise UserError(what, where=path, hint="resume with the options of the run")
    with safe_open_checked(path) as file:
        found: dict[str, Any] = {**own["scalars"], **{name: file.get_tensor(name).clone() for name in file.keys()}}  # noqa: SIM118
    kept = {name.partition(SEPARATOR)[2]: found.pop(name) for name in list(found) if name.startswith(f"{EXACT}{SEPARATOR}")}
    if {name: tensor.shape for name, tensor in kept.items()} != {name: tensor.shape for name, tensor in exact.items()}:
        what = "holds other tensors beside the optimizer's than this run needs"
        raise UserError(what, where=path, hint="resume with the options of the run")
    by_name: dict[str, dict[str, Any]] = {}
    for full, value in found.items():
        name, _, key = full.rpartition(SEPARATOR)
        wrong_shape = isinstance(value, Tensor) and value.dim() > 0 and name in parameters and value.shape != parameters[name].shape
        if name not in parameters or wrong_shape:
            raise UserError(f"holds {full}, which does not fit the model", where=path)
        by_name.setdefault(name, {})[key] = value
    names_of = {id(parameter): name for name, parameter in parameters.items()}
    order = [names_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    plain = optimizer.state_dict()
    plain["state"] = {number: by_name[name] for number, name in enumerate(order) if name in by_name}
    optimizer.load_state_dict(plain)
    with torch.no_grad():
        for name, tensor in exact.items():
            tensor.copy_(kept[name])
    values: dict[str, Any] = stored[VALUES]
    return values
