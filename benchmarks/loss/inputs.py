"""Hidden states, head and labels of a case, and its loss and gradients in float64.

Notable:
- The inputs are created once and shared by all methods, bit for bit.
- The float64 gradients are exact but partial, since all of them would take minutes: with respect to the hidden states of
  `REFERENCE_ROWS` evenly spaced rows, and to `REFERENCE_ENTRIES` rows of the head (half of them labels, the rest evenly
  spaced). Every row of the batch contributes to the latter.
- The gate is a factor on a row's gradient, so one pass serves every gate.

Legend: N tokens, D hidden size, V vocabulary; R rows of a block, S rows checked, E vocabulary entries checked.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from eaftdrope.errors import UserError
from eaftdrope.loss.definition import evaluate_gate, token_statistics
from eaftdrope.loss.gates import resolve_gate

from .cases import Case
from .pairs import row_slices

REFERENCE_ROWS = 256
REFERENCE_ENTRIES = 2048
GATES = ("eaft", "eaft-exact", "none")
_IGNORED_SPAN = 32
_SEED = 20260102
# bytes of one block of float64 logits
_BLOCK_BYTES = 128 << 20
MODEL = "package:smollm2-135m-instruct"


def make_inputs(case: Case, text: Path | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`(hidden [N, D], weight [V, D], labels [N])` in the dtype of the case, on the CPU."""
    hidden_ND, weight_VD, labels_N = _real(case, text) if case.logits == "real" else _random(case)
    if case.trains == "half-ignored":
        labels_N[torch.arange(case.rows) // _IGNORED_SPAN % 2 == 0] = -100
    dtype = getattr(torch, case.dtype)
    return hidden_ND.to(dtype), weight_VD.to(dtype), labels_N


def _random(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Half of the rows are diffuse (unit variance), a quarter confident of the label, a quarter of another token."""
    generator = torch.Generator().manual_seed(_SEED)
    weight_VD = torch.randn(case.vocabulary, case.hidden_size, generator=generator) / math.sqrt(case.hidden_size)
    hidden_ND = torch.randn(case.rows, case.hidden_size, generator=generator)
    labels_N = torch.randint(0, case.vocabulary, (case.rows,), generator=generator)
    favourite_N = torch.where(torch.arange(case.rows) % 4 == 1, labels_N, labels_N.roll(1))
    sure_N = torch.arange(case.rows) % 2 == 1
    # a logit of 25 against the others' unit variance gives an entropy of about 1e-5
    hidden_ND[sure_N] += 25 * weight_VD[favourite_N[sure_N]]
    return hidden_ND, weight_VD, labels_N


def _real(case: Case, text: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the last hidden states of the model over the text, its head, and the next tokens."""
    from eaftdrope.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    tokens = _tokens(tokenizer, text, case.rows + 1)
    model = load_model(MODEL, dtype="float32").eval()
    hidden = []
    with torch.no_grad():
        for block in row_slices(case.rows, 1024):
            hidden.append(model.base_model(input_ids=tokens[None, block]).last_hidden_state[0])
        weight_VD = model.get_output_embeddings().weight.clone()
    hidden_ND = torch.cat(hidden)
    if (hidden_ND.shape[1], weight_VD.shape[0]) != (case.hidden_size, case.vocabulary):
        raise UserError(f"the head of {MODEL} is {tuple(weight_VD.shape)}, not that of the shape {case.shape}.")
    return hidden_ND, weight_VD, tokens[1:].clone()


def _tokens(tokenizer, text: Path | None, count: int) -> Tensor:
    """Return the first `count` tokens of a text file, or of the function-calling rows of the quickstart."""
    if text is not None:
        ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    else:
        from eaftdrope.data import Source, build_dataset

        rows, _ = build_dataset([Source("package:bfcl", limit=count)], tokenizer, max_length=1024)
        ids = []
        for row in rows:
            ids.extend(row["input_ids"])
            if len(ids) >= count:
                break
    if len(ids) < count:
        raise UserError(f"{text or 'package:bfcl'} has {len(ids)} tokens, fewer than {count}. Use another --text.")
    return torch.tensor(ids[:count])


def reference(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> dict:
    """Return loss and gradients in float64 from the same bits: `rows [S]` and `entries [E]` are the indices that are
    checked, and for each gate `loss`, `hidden [S, D]` and `weight [E, D]`."""
    rows_S = _spread(labels_N.numel(), REFERENCE_ROWS).to(labels_N.device)
    entries_E = _entries(labels_N, weight_VD.shape[0])
    trained_N = labels_N != -100
    count = int(trained_N.sum())
    hidden_ND, weight_VD = hidden_ND.double(), weight_VD.double()
    result = {"rows": rows_S.cpu(), "entries": entries_E.cpu(), "gates": {}}
    sums = {gate: [0.0, [], torch.zeros(entries_E.numel(), weight_VD.shape[1]).to(weight_VD)] for gate in GATES}

    for block in row_slices(labels_N.numel(), max(1, _BLOCK_BYTES // (8 * weight_VD.shape[0]))):
        hidden_RD, trained_R = hidden_ND[block], trained_N[block]
        labels_R = labels_N[block].clamp_min(0)
        logits_RV = hidden_RD @ weight_VD.T
        stats = token_statistics(logits_RV, labels_R, k=20)
        gradient_RV = logits_RV.softmax(-1)
        gradient_RV[torch.arange(len(labels_R), device=labels_R.device), labels_R] = torch.expm1(-stats.nll)
        # the checked rows that are in this block
        inside = rows_S[(rows_S >= block.start) & (rows_S < block.stop)] - block.start
        by_hidden_SD = gradient_RV[inside] @ weight_VD
        for gate in GATES:
            weight_R = evaluate_gate(resolve_gate(gate), stats) * trained_R / count
            sums[gate][0] += (weight_R * stats.nll).sum().item()
            sums[gate][1].append(weight_R[inside, None] * by_hidden_SD)
            sums[gate][2] += (weight_R[:, None] * gradient_RV[:, entries_E]).T @ hidden_RD
    for gate, (loss, by_hidden, by_weight_ED) in sums.items():
        result["gates"][gate] = {"loss": loss, "hidden": torch.cat(by_hidden).cpu(), "weight": by_weight_ED.cpu()}
    return result


def _entries(labels_N: Tensor, vocabulary: int) -> Tensor:
    """Return indices: half of them labels (or all labels, if there are few), the others evenly spaced in the vocabulary."""
    labels = labels_N[labels_N != -100].unique()
    chosen = labels[_spread(labels.numel(), REFERENCE_ENTRIES // 2).to(labels.device)]
    return torch.cat([chosen, _spread(vocabulary, REFERENCE_ENTRIES // 2).to(labels.device)]).unique()


def _spread(total: int, count: int) -> Tensor:
    """Return at most `count` evenly spaced elements of `range(total)`."""
    return torch.linspace(0, total - 1, min(total, count)).long()


def errors(loss: float, hidden_grad_ND: Tensor, weight_grad_VD: Tensor | None, truth: dict, gate: str) -> dict:
    """Return the relative errors of the loss and (in the Frobenius norm) the gradients; None for one that was not formed."""
    exact = truth["gates"][gate]

    def relative(actual: Tensor, expected: Tensor) -> float:
        return ((actual.cpu().double() - expected).norm() / expected.norm()).item()

    return {
        "loss_error": abs(loss - exact["loss"]) / abs(exact["loss"]),
        "hidden_error": relative(hidden_grad_ND[truth["rows"].to(hidden_grad_ND.device)], exact["hidden"]),
        "weight_error": None
        if weight_grad_VD is None
        else relative(weight_grad_VD[truth["entries"].to(weight_grad_VD.device)], exact["weight"]),
    }
