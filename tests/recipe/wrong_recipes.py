"""Wrong recipes, each with the line of its problem and parts of the message."""

# The recipe that each case spoils. Line numbers of the cases refer to it.
GOOD = """\
model: org/model
data:
  train: rows.jsonl
  held_out: 0.05
  format: auto
  max_length: 512
loss:
  gate: eaft
  alpha: 1.0
lora:
  r: 16
  target_modules: all-linear
train:
  epochs: 1
  learning_rate: 1e-4
  scheduler: cosine
probes:
  target: [held_out_loss]
  general: [perplexity]
output:
  dir: runs/mine
  report_to: none
"""


def swap(old, new):
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


# name -> (text, line of the problem, parts of its message)
CASES = {
    "typo in a section": (swap("loss:", "los:"), 7, ["los: unknown key. Did you mean `loss`?"]),
    "typo in data": (swap("format: auto", "fromat: auto"), 5, ["data.fromat: unknown key. Did you mean `format`?"]),
    "typo in loss": (swap("alpha: 1.0", "alhpa: 1.0"), 9, ["loss.alhpa: unknown key. Did you mean `alpha`?"]),
    "typo in lora": (
        swap("target_modules:", "target_module:"),
        12,
        ["lora.target_module: unknown key. Did you mean `target_modules`", "(keys here: r, alpha, dropout,"],
    ),
    "typo in train": (
        swap("learning_rate:", "learning_rte:"),
        15,
        ["train.learning_rte: unknown key. Did you mean `learning_rate`?"],
    ),
    "typo in probes": (swap("general:", "genral:"), 19, ["probes.genral: unknown key. Did you mean `general`?"]),
    "typo in output": (swap("dir:", "dri:"), 21, ["output.dri: unknown key. Did you mean `dir`?"]),
    "typo in a source": (
        swap("train: rows.jsonl", "train:\n    - path: rows.jsonl\n      wieght: 2"),
        5,
        ["data.train[0].wieght: unknown key. Did you mean `weight`?"],
    ),
    "typo in the options of a probe": (
        swap("target: [held_out_loss]", "target:\n    - held_out_loss: {limt: 3}"),
        19,
        ["probes.target[0].held_out_loss.limt: unknown key. Did you mean `limit`?   (keys here: limit)"],
    ),
    "a key of another toolkit": (
        swap("learning_rate: 1e-4", "lr: 1e-4"),
        15,
        ["train.lr: unknown key. Did you mean `train.learning_rate`?"],
    ),
    "a flat key of another toolkit": (
        GOOD + "max_seq_length: 512\n",
        23,
        ["max_seq_length: unknown key. Did you mean `data.max_length`?"],
    ),
    "a key outside its section": (
        GOOD + "learning_rate: 1e-4\n",
        23,
        ["learning_rate: unknown key. It belongs elsewhere: `train.learning_rate`."],
    ),
    "a key in the wrong section": (
        swap("alpha: 1.0", "max_length: 512"),
        9,
        ["loss.max_length: unknown key. It belongs elsewhere: `data.max_length`."],
    ),
    "unknown gate": (
        swap("gate: eaft", "gate: eatf"),
        8,
        ["loss.gate: 'eatf' is not one of eaft, eaft-vocab,", "Did you mean `eaft`?"],
    ),
    "option of another gate": (
        swap("gate: eaft", "gate: focal"),
        9,
        [
            "loss.alpha: gate focal has no option alpha (its options: gamma). alpha belongs to: eaft, eaft-vocab, eaft-exact"
        ],
    ),
    "option of a gate that has none": (
        swap("gate: eaft", "gate: dft"),
        9,
        ["loss.alpha: gate dft has no option alpha (it has none)."],
    ),
    "alpha as text": (
        swap("alpha: 1.0", "alpha: strong"),
        9,
        ["loss.alpha: expected a number, found 'strong' (text)"],
    ),
    "a number in quotes": (
        swap("r: 16", 'r: "16"'),
        11,
        ["lora.r: expected a whole number, found '16' (text). Remove the quotes"],
    ),
    "a fraction where a whole number belongs": (
        swap("max_length: 512", "max_length: 512.5"),
        6,
        ["data.max_length: expected a whole number, found 512.5 (a number)"],
    ),
    "true where a number belongs": (
        swap("r: 16", "r: true"),
        11,
        ["lora.r: expected a whole number, found true (true/false)"],
    ),
    "yes where true belongs": (
        swap("max_length: 512", "packing: yes"),
        6,
        ["data.packing: expected true or false, found 'yes' (text). Write true"],
    ),
    "infinity": (swap("1e-4", ".inf"), 15, ["train.learning_rate: expected a finite number, found inf (a number)"]),
    "negative learning rate": (
        swap("1e-4", "-1e-4"),
        15,
        ["train.learning_rate: must be greater than 0, found -0.0001 (a number)"],
    ),
    "rank of zero": (swap("r: 16", "r: 0"), 11, ["lora.r: must be at least 1, found 0 (a whole number)"]),
    "share of one": (
        swap("held_out: 0.05", "held_out: 1.0"),
        4,
        ["data.held_out: must be less than 1, found 1.0 (a number)"],
    ),
    "unknown format": (
        swap("format: auto", "format: sharegtp"),
        5,
        [
            "data.format: 'sharegtp' is not one of auto, messages, sharegpt, alpaca, prompt_completion, text, "
            "question_answer, reasoning, pubmedqa, xlam, glaive. Did you mean `sharegpt`?"
        ],
    ),
    "unknown scheduler": (
        swap("scheduler: cosine", "scheduler: cosin"),
        16,
        ["train.scheduler: 'cosin' is not one of linear,", "Did you mean `cosine`"],
    ),
    "unknown probe": (
        swap("[held_out_loss]", "[held_out_los]"),
        18,
        ["probes.target[0]: unknown probe 'held_out_los'. Did you mean `held_out_loss`?"],
    ),
    "a probe in the other list": (
        swap("[perplexity]", "[perplexity, function_calls]"),
        19,
        ["probes.general[1]: 'function_calls' belongs under probes.target"],
    ),
    "missing data file": (
        swap("rows.jsonl", "row.jsonl"),
        3,
        ["data.train: no such file: 'row.jsonl' (looked for in ", "Did you mean `rows.jsonl`?"],
    ),
    "missing file of a probe": (
        swap("[perplexity]", "[{perplexity: {files: [rows.json]}}]"),
        19,
        ["probes.general[0].perplexity.files: no such file: 'rows.json' (looked for in ", "Did you mean `rows.jsonl`"],
    ),
    "missing model folder": (
        swap("org/model", "./modle"),
        1,
        ["model: no such file: './modle' (looked for in ", "Did you mean `./model`?"],
    ),
    "unknown model package": (
        swap("org/model", "package:smollm2-135m-instrct"),
        1,
        ["model: ", "smollm2-135m-instruct"],
    ),
    "no model": (swap("model: org/model\n", ""), 1, ["model: missing. Hub id, local folder or package:NAME"]),
    "no training data": (
        swap("  train: rows.jsonl\n", ""),
        2,
        ["data.train: missing. A source, or a list of them"],
    ),
    "an empty section": (
        swap("  gate: eaft\n  alpha: 1.0\n", ""),
        7,
        ["loss: expected a mapping (`key: value` lines), found nothing. Remove the key, or put keys under it"],
    ),
    "an empty lora section": (
        swap("  r: 16\n  target_modules: all-linear\n", ""),
        10,
        ["lora: nothing is set. Write `lora: {}` for adapters with the defaults, or `lora: null` for a full fine-tune"],
    ),
    "a section that is text": (
        swap("lora:\n  r: 16\n  target_modules: all-linear", "lora: 16"),
        10,
        ["lora: expected a mapping (`key: value` lines), found 16 (a whole number)"],
    ),
    "epochs and steps": (
        swap("epochs: 1", "epochs: 1\n  steps: 25"),
        15,
        ["train.steps: epochs and steps are both set", "Keep one (on the command line: train.epochs=null)"],
    ),
    "two warm-ups": (
        swap("epochs: 1", "warmup_ratio: 0.1\n  warmup_steps: 5"),
        15,
        ["train.warmup_steps: warmup_ratio and warmup_steps are both set. Keep one"],
    ),
    "a warm-up the schedule ignores": (
        swap("scheduler: cosine", "scheduler: constant\n  warmup_ratio: 0.1"),
        17,
        ["train.warmup_ratio: scheduler constant has no warm-up", "Use scheduler constant_with_warmup"],
    ),
    "an adapter on the head": (
        swap("target_modules: all-linear", "target_modules: [q_proj, lm_head]"),
        12,
        ["lora.target_modules: an adapter on lm_head:", "Put lm_head in lora.modules_to_save instead"],
    ),
    "target modules misspelt": (
        swap("all-linear", "all_linaer"),
        12,
        ["lora.target_modules: expected all-linear or a list of module names", "Did you mean `all-linear`?"],
    ),
    "a probe without held-out rows": (
        swap("  held_out: 0.05\n", ""),
        17,
        ["probes.target[0]: held_out_loss is measured on held-out rows, and the recipe has none. Set data.held_out:"],
    ),
    "evaluation without held-out rows": (
        swap("  held_out: 0.05\n", "").replace("epochs: 1", "eval_every: 5").replace("[held_out_loss]", "[]"),
        13,
        ["train.eval_every: no rows to evaluate on. Set data.held_out:"],
    ),
    "held out from what is trained on": (
        swap("held_out: 0.05", "held_out: rows.jsonl"),
        4,
        ["data.held_out: 'rows.jsonl' (split train) is trained on as well", "a share of train such as 0.05"],
    ),
    "merging without adapters": (
        swap("lora:\n  r: 16\n  target_modules: all-linear\n", "").replace("report_to: none", "merge: true"),
        19,
        ["output.merge: no adapters to merge", "Leave merge out, or add lora"],
    ),
    "duplicate keys": (
        swap("epochs: 1", "epochs: 1\n  epochs: 2"),
        15,
        ["train.epochs: this key is already on line 14. Keep one of the two"],
    ),
    "duplicate sections": (
        GOOD + "loss: {gate: none}\n",
        23,
        ["loss: this key is already on line 7. Keep one of the two"],
    ),
    "a tab": (
        swap("  epochs: 1", "\tepochs: 1"),
        14,
        ["the line is indented with a tab, which YAML does not allow. Use spaces"],
    ),
    "a wrong indentation": (
        swap("  epochs: 1", "   epochs: 1"),
        15,
        ["not valid YAML:", "Is this line indented like the lines above it?"],
    ),
    "a bracket left open": (swap("[held_out_loss]", "[held_out_loss"), 19, ["not valid YAML:"]),
    "text with a colon": (
        swap("dir: runs/mine", "dir: runs: mine"),
        21,
        ["not valid YAML: mapping values are not allowed here", "needs quotes"],
    ),
    "two documents": (GOOD + "---\n" + GOOD, 23, ["One file is one recipe: remove the `---`"]),
    "an unknown anchor": (swap("epochs: 1", "epochs: *one"), 14, ["not valid YAML: found undefined alias"]),
    "a key that is a number": (swap("epochs: 1", "1: 1"), 14, ["train: a key must be text, found `1`"]),
    "an empty file": ("", 1, ["the file is empty. A recipe starts with `model: ...`"]),
    "only comments": ("# nothing\n", 1, ["the file is empty. A recipe starts with `model: ...`"]),
    "a list at the top": (
        "- model: org/model\n",
        1,
        ["a recipe is a mapping of sections (model, data, ...), found a list"],
    ),
    "text at the top": ("hello\n", 1, ["a recipe is a mapping of sections (model, data, ...), found 'hello' (text)"]),
    "a control character": (
        swap("org/model", "org\x07model"),
        1,
        ["not a text file: special characters are not allowed"],
    ),
    "a repository name with spaces": (
        swap("report_to: none", "push_to_hub: my model"),
        22,
        ["output.push_to_hub: must look like me/my-model, found 'my model' (text)"],
    ),
    "none beside a tracker": (
        swap("report_to: none", "report_to: [none, wandb]"),
        22,
        ["output.report_to: none is set together with a logger: leave one of them out"],
    ),
}
