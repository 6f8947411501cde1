"""Every error a user can meet. Each message says what went wrong, where (a name, a shape), why, and what to do next."""

__all__ = [
    "CalibrationError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "EngineWarning",
    "FusedSettingsWarning",
    "GPTQError",
    "NoLinearError",
    "NonFiniteError",
    "PassError",
    "QualityError",
    "RankError",
    "RoundedScalesWarning",
    "SolverError",
    "StrictError",
    "TrainingWarning",
    "TuningError",
]


class GPTQError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(GPTQError, ValueError):
    """A setting is wrong, or does not fit the model it is applied to."""


class CalibrationError(GPTQError, ValueError):
    """The calibration data is missing, empty, or not what the model takes."""


class CaptureError(GPTQError, RuntimeError):
    """torch.export could not turn the model into a graph."""


class NoLinearError(GPTQError, ValueError):
    """The model has no weight that could be quantized."""


class NonFiniteError(GPTQError, ValueError):
    """A weight, an activation or a scale is NaN or infinite."""


class SolverError(GPTQError, RuntimeError):
    """The Hessian of a layer could not be factored."""


class StrictError(SolverError, ConfigError):
    """`strict` forbids what would have to be done."""


class CheckpointError(GPTQError, RuntimeError):
    """A checkpoint is incomplete, inconsistent, unsafe, or cannot be written."""


class TuningError(GPTQError, ValueError):
    """The file with measured configurations of kernels cannot be used."""


class PassError(GPTQError, AssertionError):
    """A graph pass broke its own invariant: a defect of this package, please report it with the message."""


class QualityError(GPTQError, RuntimeError):
    """The quantized model differs more from the original than it may."""


class RankError(GPTQError, RuntimeError):
    """Another of the processes that quantize together has failed."""


class FusedSettingsWarning(UserWarning):
    """Weights that inference engines fuse into one would have different settings."""


class EngineWarning(UserWarning):
    """A checkpoint is of a kind that the engine it is for, or every engine, does not serve."""


class RoundedScalesWarning(UserWarning):
    """Scales of a checkpoint are not fp16 numbers, and were rounded."""


class TrainingWarning(UserWarning):
    """The program around `quantize_` holds parameters that are replaced, or its processes quantize apart."""
