"""The commands of `moelab` about kernels and speed: `kernels` and `bench`."""

from __future__ import annotations

from moelab.cli import words


def declare(commands) -> None:
    """Adds the two groups."""
    kernels = words.group(commands, "kernels", "list the GPU kernels; verify them without a GPU")
    _kernels(kernels)
    _fit(kernels)
    _roofline(kernels)
    text = "time backends, layers and steps; compare with older times"
    _bench(words.group(commands, "bench", text))


def _kernels(kernels) -> None:
    text = "which GPU kernels there are, and what is proven of each"
    words.add(kernels, "list", "kernels:listing", text)
    text = "compile kernels for GPUs that are not here and check the machine code"
    verify = words.add(kernels, "verify", "kernels:verify", text)
    verify.add_argument(
        "--target",
        type=words.names,
        default=(),
        metavar="A,B",
        help="GPUs: b200,h100,... (all of them)",
    )
    verify.add_argument(
        "--kernel",
        type=words.names,
        default=(),
        metavar="A,B",
        help="kernels of 'kernels list' (all)",
    )


def _fit(kernels) -> None:
    text = "compile a config's whole model for GPUs that are not here; memory of a device"
    fit = words.add(kernels, "fit", "fit:fit", text, words.takes_config)
    fit.add_argument(
        "--target", metavar="GPU", default="b200", help="one of 'kernels verify' (b200)"
    )
    fit.add_argument("--devices", type=words.positive, default=1, metavar="N", help="how many (1)")
    fit.add_argument(
        "--tokens",
        type=words.positive,
        default=512,
        metavar="N",
        help="on each device, one sequence (512)",
    )
    fit.add_argument(
        "--format", choices=("nvfp4", "mxfp4"), default="nvfp4", help="of the experts (nvfp4)"
    )


def _roofline(kernels) -> None:
    text = "what bounds a grouped matmul for the experts of published models, by a model of the GPU"
    roofline = words.add(kernels, "roofline", "roofline:roofline", text)
    roofline.add_argument(
        "--kernel",
        choices=("mosaic_sm100", "mosaic_sm90", "triton_w4a16"),
        default="mosaic_sm100",
        help="which kernel (mosaic_sm100)",
    )
    roofline.add_argument("--target", metavar="GPU", default="", help="b200, or h100 for W4A16")
    roofline.add_argument(
        "--model", type=words.names, default=(), metavar="A,B", help="models (all)"
    )
    roofline.add_argument(
        "--format", choices=("nvfp4", "mxfp4"), default="nvfp4", help="of the weights (nvfp4)"
    )
    roofline.add_argument(
        "--tokens",
        type=words.counts,
        default=(1, 8, 64, 512, 4096, 16384, 65536),
        metavar="N,M",
        help="tokens of the batch (1,8,64,512,4096,16384,65536)",
    )


def _bench(bench) -> None:
    for name, repeats, shape, text in (
        ("kernels", 15, "T,E,N,K", "the grouped matmul of every backend of this device"),
        ("layer", 21, "E,K[,T,D,F]", "MoE layers against a dense one of equal active FLOPs"),
        ("step", 7, "", "training steps against those of a dense model of equal active width"),
    ):
        command = words.add(bench, name, f"bench:{name}", f"time {text}")
        command.add_argument(
            "--repeats",
            type=words.positive,
            default=repeats,
            metavar="N",
            help=f"rounds ({repeats})",
        )
        if shape:
            command.add_argument(
                "--shape", action="append", metavar=shape, help="repeat for more (a list of ours)"
            )
        command.add_argument("--out", metavar="FILE", default="", help="write the rows, as JSON")
        command.add_argument(
            "--compare", metavar="FILE", default="", help="how much longer than an --out of before"
        )
