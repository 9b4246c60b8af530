"""Settings of the commands `verify`, `predict` and `positions`."""

from dataclasses import dataclass


@dataclass
class VerifyConfig:
    """Bounds and observability on the weights of a checkpoint.

    Args:
        checkpoint: directory of the model, a hub's ORG/NAME (@REVISION), or a GGUF file.
        against: the model before extension, given likewise: shows what training changed.
        target: window L in tokens (default: the checkpoint's own); distances 0..L-1 are examined.
        window: of the checkpoint, in tokens, where its config leaves open whether it is stated before or after scaling.
        context: tokens of a training row's context (default: as the checkpoint's endprompt.json says, else the
            original window less the prompt).
        prompt: tokens of the end prompt (default: as recorded there, else 20).
        scheme: position scheme that the rows were laid out by, see `endprompt positions` (default: as recorded, else
            endprompt).
        count: number of anchors, for scheme anchors (default: as recorded, else 4).
        text: a text file to read (default: the sample that ships with the package).
        tokens: at most this many tokens of the text are read, and never more than the original window.
        pairs: query-key pairs for each head.
        noise: standard deviation of an observed score, in units of the score's own root mean square.
        output: run directory.
        method: the name this checkpoint has in the rows (default: that of its endprompt.json, else base, or its RoPE
            scaling).
        seed: of the choice of pairs.
        dtype: of the weights: float32, bfloat16.
        device: cpu or cuda.
        formats: kinds of picture to write.
        heads: heads to draw, as layer.head,layer.head (default: the steepest of the first, middle and last layer).
    """

    checkpoint: str
    against: str | None = None
    target: int | None = None
    window: int | None = None
    context: int | None = None
    prompt: int | None = None
    scheme: str | None = None
    count: int | None = None
    text: str | None = None
    tokens: int = 1024
    pairs: int = 256
    noise: float = 0.1
    output: str = "runs/verify"
    method: str | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    formats: tuple[str, ...] = ("png", "pdf")
    heads: str = ""


@dataclass
class PredictConfig:
    """Measures of scalings and schemes on a checkpoint before it is extended.

    Args:
        checkpoint: directory of the model, a hub's ORG/NAME (@REVISION), or a GGUF file.
        target: window L in tokens that it is to be extended to (must be given).
        window: of the checkpoint, in tokens, where its config leaves open whether it is stated before or after scaling.
        prompt: tokens of the end prompt of the schemes that have one.
        text: a text file to read (default: the sample that ships with the package).
        tokens: at most this many tokens of the text are read, and never more than the window.
        noise: standard deviation of an observed score, in units of the score's own root mean square.
        seed: of the keys that fill long rows.
        dtype: of the weights: float32, bfloat16.
        device: cpu or cuda.
        json: print one JSON object a scaling and scheme, with every measure, instead of a table.
    """

    checkpoint: str
    target: int = 0
    window: int | None = None
    prompt: int = 20
    text: str | None = None
    tokens: int = 1024
    noise: float = 0.1
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    json: bool = False


@dataclass
class PositionsConfig:
    """What a position scheme lets the model observe.

    Args:
        scheme: contiguous, endprompt, endprompt-random, pose, endprompt-pose or anchors; `all` compares them.
        target: extended window L in tokens.
        context: tokens of the context.
        prompt: tokens of the end prompt (0 for none).
        count: number of anchors, for scheme anchors.
        base: RoPE base, for the predicted gap RMS.
        head_dim: rotated part of a head, for the predicted gap RMS.
        factor: interpolation factor (default: target / (context + prompt)).
        noise: standard deviation of an observed score, in units of the score's own root mean square.
        model: a checkpoint, of which it is said which layers an extension to the target changes
        plot: file to draw the coverage to (PNG or PDF by its name).
        json: print one JSON object a scheme instead of a table.
    """

    scheme: str = "endprompt"
    target: int = 65536
    context: int = 8172
    prompt: int = 20
    count: int = 4
    base: float = 500000.0
    head_dim: int = 128
    factor: float | None = None
    noise: float = 0.1
    model: str | None = None
    plot: str | None = None
    json: bool = False
