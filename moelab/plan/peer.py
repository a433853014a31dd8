"""What aiconfigurator itself predicts for a measured row: the one place that runs its code, where it is installed."""

from __future__ import annotations

import logging

from moelab.plan.measured import Row

CONTEXT_TOKENS = 8192  # of a mixed step: the engines' usual chunk
# Precisions of attention and of keys and values, tried in this order ("": its own choice): where its tables lack one
# for an engine, the next is asked for, and FP8 in blocks for FP8, so that it predicts as many rows as it can.
ATTENTION = (("", ""), ("bfloat16", "fp8"), ("bfloat16", "bfloat16"))


def tpot(row: Row) -> float | None:
    """Asks aiconfigurator for the time per output token.

    It is asked with its newest data for the engine, not with the row's version, and with the row's own quantization of
    matrices.

    Returns:
      seconds, or None where it predicts nothing (no data, no such model, no such layout).
    """
    logging.disable(logging.WARNING)
    try:
        ask = [(a, block) for block in (False, True) for a in ATTENTION]
        for attention, block in (
            ask if row.raw["moe_quant_mode"] == "fp8" else ask[: len(ATTENTION)]
        ):
            try:
                return _tpot(row, attention, block)
            except Exception:  # noqa: BLE001 - whatever it cannot do it says in a type of its own
                continue
        return None
    finally:
        logging.disable(logging.NOTSET)


def _tpot(row: Row, attention: tuple[str, str], block: bool = False) -> float | None:
    from aiconfigurator_core.sdk import common, config, perf_database
    from aiconfigurator_core.sdk.backends.factory import get_backend
    from aiconfigurator_core.sdk.models import get_model

    system = row.raw["system"]
    version = perf_database.get_latest_database_version(system=system, backend=row.engine)
    database = perf_database.get_database(system, row.engine, version)
    modes = {}
    if attention[0]:
        modes["fmha_quant_mode"] = common.FMHAQuantMode[attention[0]]
        modes["kvcache_quant_mode"] = common.KVCacheQuantMode[attention[1]]
    if row.raw["gemm_quant_mode"] and "gpt-oss" not in row.model:  # that one is MXFP4 by its config
        modes["gemm_quant_mode"] = common.GEMMQuantMode[row.raw["gemm_quant_mode"]]
        moe = "fp8_block" if block else row.raw["moe_quant_mode"]
        modes["moe_quant_mode"] = common.MoEQuantMode[moe]
    shape = config.ModelConfig(
        tp_size=row.tp,
        attention_dp_size=row.dp,
        moe_ep_size=row.ep,
        moe_tp_size=row.tp * row.dp // row.ep,
        **modes,
    )
    found = get_backend(row.engine).run_agg(
        get_model(row.model.replace("zhipuai/", "zai-org/"), shape, row.engine),
        database,
        config.RuntimeConfig(batch_size=row.batch, isl=row.isl, osl=row.osl),
        ctx_tokens=max(row.isl, CONTEXT_TOKENS),
    )
    milliseconds = float(found.get_summary_df().iloc[0]["tpot"])
    return milliseconds / 1e3 if milliseconds > 0 else None
