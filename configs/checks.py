"""The check of the config of an image model, before any work."""

import math

from ml_collections import ConfigDict

from configs.defaults import FIELDS
from configs.fields import check_fields

EXACT_MAX_DIMENSION = 256
LANGEVIN_MIN_DIMENSION = 16
CLASSES = ("class", "class_free")
_OF_ALL_MODELS = ("name", "parameterization", "num_scales", "scale_by_sigma", "nf", "ema_rate")
"""Fields that a config may not leave out, though its network may need no others."""
SPATIAL = ("inpaint", "colorize", "super_resolution", "ct", "class")


def item_shape(data: ConfigDict) -> tuple[int, ...]:
    """Of one item, with the channels first."""
    return data.shape or (data.num_channels, data.image_size, data.image_size)


def check(config: ConfigDict) -> None:
    """Whether all fields are within their ranges, and those go together that no constructor is given together.

    Raises:
        ValueError: the first that is not: name, value and what is allowed.
    """
    kind = "an image model, such as configs/digits.py"
    check_fields(config, FIELDS, kind)
    if missing := [f"model.{name}" for name in _OF_ALL_MODELS if name not in config.model]:
        raise ValueError(f"--config: no config of {kind}: it has no {missing[0]}")
    sampling, given, dropout = config.sampling, config.eval, config.training.label_dropout
    num_classes, shape = config.model.get("num_classes", 0), item_shape(config.data)
    dimension = math.prod(shape)
    condition, weight, noise = sampling.condition, sampling.guidance_weight, sampling.measurement_noise
    measured = condition not in ("", *CLASSES)
    projected, dps = (measured and sampling.conditioning == name for name in ("projection", "dps"))
    unguided = f"sampling.condition={condition!r} by projection" if condition else "unconditional sampling"
    fourier = config.model.get("embedding_type") == "fourier"
    tfhub, classifier = given.tfhub_inception, given.features == "classifier"
    rules = [
        (
            config.data.random_flip and len(shape) != 3,
            f"data.random_flip=True: flips images, data.shape=(C, H, W), not data of data.shape={shape}",
        ),
        (
            config.model.name == "vector_mlp" and fourier and config.training.sde != "vesde",
            "model.embedding_type='fourier': of vector_mlp only for training.sde='vesde'; use 'positional'",
        ),
        (
            condition in SPATIAL and len(shape) != 3,
            f"sampling.condition={condition!r}: of images, data.shape=(C, H, W), not of data.shape={shape}; 'linear' "
            "and operators of yours are for any",
        ),
        (dropout and not num_classes, f"training.label_dropout={dropout}: needs model.num_classes > 0"),
        (
            given.asym_probes == 0 and dimension > EXACT_MAX_DIMENSION,
            f"eval.asym_probes=0: the exact Jacobian is for at most {EXACT_MAX_DIMENSION} dimensions, items of "
            f"data.shape={shape} have {dimension}",
        ),
        (
            (sampling.method, sampling.corrector) == ("pc", "langevin") and dimension < LANGEVIN_MIN_DIMENSION,
            f"sampling.corrector='langevin': its step size needs at least {LANGEVIN_MIN_DIMENSION} dimensions, items "
            f"of data.shape={shape} have {dimension}; use ald, or none",
        ),
        (tfhub and given.backend != "tfgan", f"eval.tfhub_inception={tfhub}: needs --config.eval.backend=tfgan"),
        *(
            (
                classifier and given[field],
                f"eval.{field}={given[field]}: is of Inception, but eval.features='classifier'",
            )
            for field in ("inception_path", "inception_sha256", "stats_path", "tfhub_inception")
        ),
        (
            tfhub and (given.inception_path or given.inception_sha256),
            f"eval.tfhub_inception={tfhub}: takes the place of eval.inception_path and eval.inception_sha256; leave "
            "those empty",
        ),
        (
            weight != 1 and (not condition or projected),
            f"sampling.guidance_weight={weight}: {unguided} has no guidance",
        ),
        (
            sampling.class_label != -1 and condition not in CLASSES,
            f"sampling.class_label={sampling.class_label}: only for sampling.condition {' or '.join(CLASSES)}",
        ),
        (
            condition == "class_free" and not num_classes,
            "sampling.condition='class_free': needs a network that knows classes, model.num_classes > 0",
        ),
        (
            num_classes and not dropout and (condition != "class_free" or weight != 1),
            f"sampling.condition={condition!r}, sampling.guidance_weight={weight}: a network of model.num_classes="
            f"{num_classes} trained with training.label_dropout=0 has no unconditional score; it can do 'class_free' "
            "with weight 1",
        ),
        (
            projected and sampling.method == "ode" and sampling.solver != "heun",
            f"sampling.solver={sampling.solver!r}: a projection follows every step, so needs 'heun', or "
            "sampling.method=few_step; or use sampling.conditioning=pigdm",
        ),
        (
            projected and sampling.method == "pc" and noise and sampling.corrector != "none",
            f"sampling.measurement_noise={noise}: a projection leaves out what is noisier than the state, which "
            "Langevin steps then forget; use sampling.corrector=none, or sampling.conditioning=pigdm",
        ),
        (
            dps and (sampling.method != "pc" or sampling.predictor == "none" or sampling.corrector != "none"),
            "sampling.conditioning='dps': its move follows a predictor's step, so needs sampling.method=pc, a "
            "predictor, and sampling.corrector=none",
        ),
    ]
    for broken, message in rules:
        if broken:
            raise ValueError(message)
