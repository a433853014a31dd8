"""The one door to a run, for the command line and for Python: checks first, then devices, then training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_collections

from moelab import config as configs
from moelab import environment
from moelab.errors import ConfigError


def run(
    config: ml_collections.ConfigDict | Mapping | str | Path,
    workdir: str | Path = "",
    *,
    resume: str = "auto",
    progress: bool = False,
    config_file: str = "",
    overrides: Sequence[str] = (),
    command: str = "",
):
    """Trains, evaluates and records one config.

    Args:
      config: from `moelab.load_config`, nested values, or the path of a config file.
      workdir: the run directory; empty: runs/<name>-<start of the config's hash>.
      resume: auto continues the run that is in workdir, if any; never wants none there; must wants one.
      progress: draw a progress bar on standard error.
      config_file: recorded in config.json.
      overrides: recorded in config.json; they are in `config` already.
      command: recorded in the card.

    Returns:
      train.Result.

    Raises:
      ConfigError: the config has problems (one per line), or workdir holds something else.
    """
    environment.prepare()
    if isinstance(config, str | Path):
        loaded = configs.load(config)
        config, config_file = loaded.config, config_file or loaded.file
    else:
        config = configs.from_dict(dict(config))
    workdir = workdir or default_workdir(Path(config_file.partition(":")[0]).stem or "run", config)
    check(config)
    check_workdir(config, workdir, resume)
    import jax

    check(config, jax.device_count())
    from moelab import train

    return train.run(
        config,
        Path(workdir),
        resume=resume,
        progress=progress,
        config_file=config_file,
        overrides=list(overrides),
        command=command,
    )


def default_workdir(name: str, config: ml_collections.ConfigDict) -> Path:
    """Returns runs/<name>-<first 8 digits of the config's hash>."""
    return Path("runs") / f"{name}-{configs.sha256(config)[:8]}"


def check(config: ml_collections.ConfigDict, num_devices: int | None = None) -> None:
    """Raises a ConfigError that lists every problem of the config, one a line."""
    problems = configs.validate(config, num_devices)
    if problems:
        raise ConfigError("\n".join(map(str, problems)))


def check_workdir(config: ml_collections.ConfigDict, workdir: str | Path, resume: str) -> None:
    """Refuses a directory of another config, and one that does not fit `resume`."""
    configs.check_directory(config, workdir)
    exists = (Path(workdir) / "config.json").is_file()
    if resume == "must" and not exists:
        raise ConfigError(f"{workdir} holds no run to resume, and --resume=must wants one")
    if resume == "never" and exists:
        raise ConfigError(
            f"{workdir} holds this run already; --resume=auto continues it, another --workdir starts anew"
        )


def summary(config: ml_collections.ConfigDict) -> dict[str, object]:
    """Returns what a run would cost: parameters, bytes, FLOPs per token, steps and tokens. Touches no device.

    Args:
      config: without problems (`check`).
    """
    from moelab import size

    train = config.train
    return {
        **size.count(config, configs.vocab_size(config)),
        "steps": train.num_steps,
        "tokens": train.num_steps * train.batch_size * train.length,
    }
