"""A teacher: a frozen model, whose distribution over the next token the trained one learns.

    student_BTV, teacher_BTV   logits of B sequences of T positions over V tokens; N = B x T
    learned_N                  whether what follows a position is learned

The loss of a position is KL(teacher || student) = sum of p_teacher (log p_teacher - log p_student)
at temperature 1, and its gradient in the student's logits is p_student - p_teacher.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moesaic.core.errors import UserError
from moesaic.models.anatomy import build
from moesaic.models.catalog import find
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.load import load
from moesaic.models.tokenizer import VOCABULARY_FILES, load_tokenizer
from moesaic.training import setup
from moesaic.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ELEMENTS = 2**24
"""Largest number of elements of a float32 temporary (64 MiB), of which three are held at once."""
_CURE = (
    "Give a causal language model with the vocabulary of the model, such as the dense model that "
    "the mixture was made of."
)


class Teacher:
    """A model that is asked and never trained, and the `weight` of its answers in the loss."""

    def __init__(self, model: PreTrainedModel, weight: float) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.weight = weight

    def divergence(
        self, student_BTV: torch.Tensor, labels_BT: torch.Tensor, **inputs: Any
    ) -> torch.Tensor:
        """Return the sum of KL(teacher || student) in nats over what is learned; no host sync.

        `student_BTV` are the student's logits, which get the gradient, of `inputs`, the arguments
        of its forward pass; labels below 0 are not learned.
        """
        # Nothing is cast: autocast would cast the weights anew in every pass, as they are frozen.
        with torch.no_grad(), torch.autocast(student_BTV.device.type, enabled=False):
            teacher_BTV = self.model(**inputs).logits
        # As wide as the logits, so that these are not copied; nothing follows the last position.
        learned_BT = F.pad(labels_BT[:, 1:] >= 0, (0, 1))
        return kl_divergence(student_BTV.flatten(0, 1), teacher_BTV.flatten(0, 1), learned_BT)


@torch.compiler.disable  # its loop would be unrolled: ten seconds of tracing for a hundred turns
def kl_divergence(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, learned: torch.Tensor
) -> torch.Tensor:
    """Return the sum of KL(teacher || student) over the rows of logits that are `learned`, in nats.

    Probabilities are float32 whatever the logits are, of a bounded number of rows at a time. Only
    the student's logits get a gradient.
    """
    total: torch.Tensor = _Divergence.apply(student_NV, teacher_NV, learned.flatten())
    return total


class _Divergence(torch.autograd.Function):
    """The gradient is computed with the sum, so that backward needs neither logits again."""

    @staticmethod
    def forward(
        ctx: Any, student_NV: torch.Tensor, teacher_NV: torch.Tensor, learned_N: torch.Tensor
    ) -> torch.Tensor:
        gradient_NV = torch.empty_like(student_NV)
        rows = max(1, ELEMENTS // student_NV.shape[1])
        whole = (student_NV, teacher_NV, learned_N, gradient_NV)
        parts = zip(*(tensor.split(rows) for tensor in whole), strict=True)
        total = torch.stack([_divergence_of_rows(*part) for part in parts]).sum()
        ctx.save_for_backward(gradient_NV)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * grad, None, None


def _divergence_of_rows(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor,
    learned_C: torch.Tensor,
    gradient_CV: torch.Tensor,
) -> torch.Tensor:
    """Return the sum over C rows and write its gradient; the temporaries end with the call."""
    student_CV = student_CV.log_softmax(-1, dtype=torch.float32)
    teacher_CV = teacher_CV.log_softmax(-1, dtype=torch.float32)
    gap_CV = teacher_CV - student_CV
    teacher_CV.exp_()
    change_CV = student_CV.exp_().sub_(teacher_CV)
    gradient_CV.copy_(change_CV.masked_fill_(~learned_C[:, None], 0.0))
    return gap_CV.mul_(teacher_CV).sum(-1).masked_fill(~learned_C, 0.0).sum()


def load_teacher(
    config: TrainConfig,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    where: torch.device,
    how: setup.Precision,
) -> Teacher | None:
    """Load the teacher, if there is one. Raises UserError as `empty_teacher`.

    Where the student computes in bf16, the teacher's weights are bf16 too, not float32: they are
    never added to, and half as large.
    """
    empty = empty_teacher(config, student, tokenizer)
    if empty is None or config.distill is None:
        return None
    folder = config.distill.model
    experts = setup.experts_options(config) if empty._can_set_experts_implementation() else {}
    options = setup.load_options(config, "fp32" if how == "fp32" else "bf16")
    model: Any = load(folder, **options, **experts)
    setup.check_finite(folder, model)
    model = model.to(where)
    if config.data.conversations:
        setup.check_apart(model, cure="Give a teacher of another family")
    return Teacher(model, config.distill.weight)


def empty_teacher(
    config: TrainConfig, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | None:
    """Build the teacher without weights, if there is one, and check that it fits the student.

    Raises UserError where there is none, for another vocabulary, and for one that reads less.
    """
    if config.distill is None:
        return None
    folder = config.distill.model.expanduser()
    if not folder.is_dir():
        raise UserError(
            f"distill.model={config.distill.model} is no directory. Give that of the teacher, such "
            "as the dense model that the mixture was made of."
        )
    Checkpoint(folder)
    model = build(find(folder))
    check_teacher(model, student, tokenizer, folder=folder)
    setup.check_length(config, model, "the teacher")
    return model


def check_teacher(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path,
) -> None:
    """Raise UserError unless `teacher`, of `folder`, says the same tokens as the student does.

    Models may be without weights. A tokenizer in the folder is compared with the run's.
    """
    if not teacher.can_generate() or getattr(teacher.config, "is_encoder_decoder", False):
        raise UserError(
            f"distill.model={folder} holds a {type(teacher).__name__}, which is no causal language "
            f"model. {_CURE}"
        )
    theirs, ours = _width(teacher), _width(student)
    if theirs != ours:
        raise UserError(
            f"distill.model={folder} has logits for {theirs} tokens, the model for {ours}. {_CURE}"
        )
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        return
    there, here = load_tokenizer(folder).get_vocab(), tokenizer.get_vocab()
    differing = sorted(t for t in there.keys() | here.keys() if there.get(t) != here.get(t))
    if differing:
        token = differing[0]
        raise UserError(
            f"the tokenizer in distill.model={folder} is not that of this run: {len(differing)} "
            f"tokens differ, such as {token!r} (id {there.get(token, 'none')} there, "
            f"{here.get(token, 'none')} here). {_CURE}"
        )


def _width(model: PreTrainedModel) -> int:
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return int(model.config.get_text_config().vocab_size if weight is None else weight.shape[0])
