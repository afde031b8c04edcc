"""Run by another interpreter, where eaftdrope is installed with `--no-deps` beside few packages: prints one JSON object.

    python minimal.py FOLDER           the loss, apply_eaft, and the commands doctor, validate, convert and eval
    python minimal.py FOLDER --train   ten steps of AdamW through apply_eaft, with and without an adapter of PEFT

Nothing of tests/ is imported: pytest is not there either.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import eaftdrope


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes, bos_token_id=257, eos_token_id=258))


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_ = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocab={**bytes_, "<pad>": 256, "<s>": 257, "</s>": 258}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def losses(model: torch.nn.Module) -> list[float]:
    """The gated loss of ten steps on one batch."""
    ids = torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    values = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def operators() -> float:
    """The largest difference between the fused loss and the loss of the logits."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(12, 16, generator=generator), torch.randn(64, 16, generator=generator)
    labels = torch.randint(0, 64, (12,), generator=generator)
    fused = eaftdrope.fused_linear_eaft(hidden, weight, labels)
    plain = eaftdrope.eaft_loss(hidden @ weight.T, labels)
    return (fused - plain).abs().item()


def command(*arguments: str) -> dict:
    done = subprocess.run([sys.executable, "-m", "eaftdrope", *arguments], capture_output=True, text=True)
    return {"code": done.returncode, "out": done.stdout[-2000:], "err": done.stderr[-2000:]}


def imported(name: str) -> str:
    """The error of using a public name whose packages are not installed."""
    try:
        getattr(eaftdrope, name)
    except eaftdrope.UserError as error:
        return str(error)
    return ""


def main(folder: Path, train: bool) -> dict:
    result = {"home": eaftdrope.__file__, "difference": operators()}
    result["here"] = [
        name for name in ("trl", "peft", "datasets", "matplotlib", "gguf") if importlib.util.find_spec(name)
    ]
    result["losses"] = losses(eaftdrope.apply_eaft(tiny_model()).train())
    if train:
        from peft import LoraConfig, get_peft_model

        adapter = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        result["adapter_losses"] = losses(eaftdrope.apply_eaft(adapter).train())
        return result
    result["trainer"] = imported("EAFTTrainer")
    tiny_model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    model, converted = str(folder / "model"), str(folder / "nope")
    result["help"] = command("--help")
    result["doctor"] = command("doctor")
    result["convert"] = command("convert", model, converted)
    result["eval"] = command(
        *("eval", model, converted, "--suite", "general:perplexity", "--data", f"perplexity={folder / 'text.txt'}"),
        *("--device", "cpu", "--output", str(folder / "eval")),
    )
    return result


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), "--train" in sys.argv)))
