"""Figures of papers and articles against each other. Each function has its sources; the sums are all that is checked."""

from __future__ import annotations

from .check import Check


def target_and_general() -> Check:
    """E10, arXiv 2601.02151, tables 1 to 3: (EAFT, SFT) averages on the target and in general."""
    target = {
        "Qwen3-4B math": (69.3, 69.4),
        "Qwen2.5-32B math": (65.5, 66.5),
        "GLM4-9B math": (39.4, 40.1),
        "Qwen3-4B-Thinking medical": (73.7, 73.6),
        "Qwen3-4B agent": (60.8, 61.4),
    }
    values = {f"{name}: EAFT minus SFT on the target": round(ours - sft, 1) for name, (ours, sft) in target.items()}
    return Check(
        "E10", "EAFT is within one point of SFT on every target of the paper", min(values.values()) >= -1, values
    )


def preserved() -> Check:
    """E12, the article's figures and those of arXiv 2601.02151, table 2 (general: base, SFT, EAFT)."""
    article, paper = (86.1, 81.3, 85.1), (86.1, 81.3, 84.5)
    shares = [round((eaft - sft) / (base - sft), 3) for base, sft, eaft in (article, paper)]
    values = {
        "share of the loss avoided, the article's figures": shares[0],
        "share of the loss avoided, the paper's figures": shares[1],
    }
    return Check("E12", "the article's 78 % follows from the paper's table", abs(shares[1] - 0.78) < 0.005, values)


def growing_gain() -> Check:
    """E13, arXiv 2601.02151, table 1: the general average, EAFT minus SFT, by size."""
    values = {"4B": round(80.1 - 76.5, 1), "9B": round(72.7 - 70.6, 1), "32B": round(83.7 - 81.6, 1)}
    return Check("E13", "the gain over SFT grows with size", values["4B"] < values["9B"] < values["32B"], values)


def short_recovery() -> Check:
    """D2, arXiv 2512.12167: tokens of recalibration over tokens of pretraining."""
    values = {"360M: 5B of 600B": round(5 / 600, 4), "1.7B: 20B of 1T": round(20 / 1000, 4)}
    return Check("D2", "both SmolLM models had less than 1 % of their pretraining", max(values.values()) < 0.01, values)


def llama_share() -> Check:
    """D4, arXiv 2512.12167 counts 4T tokens of pretraining for Llama 2; the Llama 2 report (arXiv 2307.09288) has 2T."""
    values = {"20B of 4T": round(20 / 4000, 4), "20B of 2T": round(20 / 2000, 4)}
    return Check("D4", "20B tokens are 0.5 % of Llama 2's 2T tokens", abs(values["20B of 2T"] - 0.005) < 1e-4, values)


def longbench() -> Check:
    """D9, arXiv 2512.12167, tables 2, 3 and 7: averages of the base and of DroPE."""
    values = {
        "360M, five tasks with NIAH": round(30.52 / 2.98, 1),
        "1.7B, four tasks": round(21.49 / 3.11, 1),
        "360M, all of LongBench": round(13.81 / 2.59, 1),
    }
    return Check("D9", "the average on LongBench is more than ten times the base's", min(values.values()) > 10, values)


def cost() -> Check:
    """D12, arXiv 2512.12167, table 4: tokens of recalibration of SmolLM-360M over its 600B."""
    budgets = (31.46, 62.9, 125.8)
    values = {f"{tokens:g}B of 600B": round(tokens / 600, 3) for tokens in budgets}
    return Check("D12", "every budget of the paper is at most 5 % of pretraining", max(values.values()) <= 0.05, values)


CHECKS = (target_and_general, preserved, growing_gain, short_recovery, llama_share, longbench, cost)
