"""The message format between server and clients, which only this package knows."""

from clip2fl_common.messages.arrays import (
    NotFiniteError as NotFiniteError,
)
from clip2fl_common.messages.arrays import (
    ReplyError as ReplyError,
)
from clip2fl_common.messages.arrays import (
    arrays_to_numpy as arrays_to_numpy,
)
from clip2fl_common.messages.arrays import (
    arrays_to_tensors as arrays_to_tensors,
)
from clip2fl_common.messages.arrays import (
    load_arrays as load_arrays,
)
from clip2fl_common.messages.arrays import (
    message_bytes as message_bytes,
)
from clip2fl_common.messages.arrays import (
    model_to_arrays as model_to_arrays,
)
from clip2fl_common.messages.arrays import (
    numpy_to_arrays as numpy_to_arrays,
)
from clip2fl_common.messages.arrays import (
    payload_bytes as payload_bytes,
)
from clip2fl_common.messages.arrays import (
    record_bytes as record_bytes,
)
from clip2fl_common.messages.arrays import (
    state_to_arrays as state_to_arrays,
)
from clip2fl_common.messages.class_gradients import (
    ClassGradients as ClassGradients,
)
from clip2fl_common.messages.class_gradients import (
    GradientFormat as GradientFormat,
)
from clip2fl_common.messages.class_gradients import (
    gradients_from_arrays as gradients_from_arrays,
)
from clip2fl_common.messages.class_gradients import (
    gradients_to_arrays as gradients_to_arrays,
)
from clip2fl_common.messages.class_statistics import (
    ClassStatistics as ClassStatistics,
)
from clip2fl_common.messages.class_statistics import (
    StatisticsFormat as StatisticsFormat,
)
from clip2fl_common.messages.class_statistics import (
    symmetric as symmetric,
)
from clip2fl_common.messages.class_statistics import (
    triangle_size as triangle_size,
)
from clip2fl_common.messages.class_statistics import (
    upper_triangle as upper_triangle,
)
from clip2fl_common.messages.delivery import (
    MIN_PIECE_BYTES as MIN_PIECE_BYTES,
)
from clip2fl_common.messages.delivery import (
    MODEL_ACTION as MODEL_ACTION,
)
from clip2fl_common.messages.delivery import (
    MODEL_REQUEST as MODEL_REQUEST,
)
from clip2fl_common.messages.delivery import (
    PIECE_BYTES as PIECE_BYTES,
)
from clip2fl_common.messages.delivery import (
    ModelAnswer as ModelAnswer,
)
from clip2fl_common.messages.delivery import (
    ModelOffer as ModelOffer,
)
from clip2fl_common.messages.delivery import (
    ModelState as ModelState,
)
from clip2fl_common.messages.errors import (
    error_reason as error_reason,
)
from clip2fl_common.messages.fields import (
    ArrayFields as ArrayFields,
)
from clip2fl_common.messages.fields import (
    Declaration as Declaration,
)
from clip2fl_common.messages.fields import (
    ReplyField as ReplyField,
)
from clip2fl_common.messages.fields import (
    array_fields as array_fields,
)
from clip2fl_common.messages.fields import (
    reply_field as reply_field,
)
from clip2fl_common.messages.names import (
    ARRAYS as ARRAYS,
)
from clip2fl_common.messages.names import (
    AVERAGED_METRICS as AVERAGED_METRICS,
)
from clip2fl_common.messages.names import (
    CLASS_STATISTICS as CLASS_STATISTICS,
)
from clip2fl_common.messages.names import (
    CLASSES as CLASSES,
)
from clip2fl_common.messages.names import (
    CLASSIFIER as CLASSIFIER,
)
from clip2fl_common.messages.names import (
    CLIENT_SECONDS as CLIENT_SECONDS,
)
from clip2fl_common.messages.names import (
    CODE_FINGERPRINT as CODE_FINGERPRINT,
)
from clip2fl_common.messages.names import (
    CONFIG as CONFIG,
)
from clip2fl_common.messages.names import (
    CONFUSION as CONFUSION,
)
from clip2fl_common.messages.names import (
    DATA_ERROR as DATA_ERROR,
)
from clip2fl_common.messages.names import (
    DISTILLATION_TEMPERATURE as DISTILLATION_TEMPERATURE,
)
from clip2fl_common.messages.names import (
    DISTILLATION_WEIGHT as DISTILLATION_WEIGHT,
)
from clip2fl_common.messages.names import (
    DIVERGED as DIVERGED,
)
from clip2fl_common.messages.names import (
    FIELDS as FIELDS,
)
from clip2fl_common.messages.names import (
    GRADIENTS as GRADIENTS,
)
from clip2fl_common.messages.names import (
    HEAD_RECORDS as HEAD_RECORDS,
)
from clip2fl_common.messages.names import (
    LARGEST_VALUE as LARGEST_VALUE,
)
from clip2fl_common.messages.names import (
    LONGEST_HEADER as LONGEST_HEADER,
)
from clip2fl_common.messages.names import (
    METRICS as METRICS,
)
from clip2fl_common.messages.names import (
    MOMENTS as MOMENTS,
)
from clip2fl_common.messages.names import (
    NUM_EXAMPLES as NUM_EXAMPLES,
)
from clip2fl_common.messages.names import (
    PARTITION as PARTITION,
)
from clip2fl_common.messages.names import (
    PROXIMAL_MU as PROXIMAL_MU,
)
from clip2fl_common.messages.names import (
    RECALL as RECALL,
)
from clip2fl_common.messages.names import (
    RECALL_STEP as RECALL_STEP,
)
from clip2fl_common.messages.names import (
    ROUND as ROUND,
)
from clip2fl_common.messages.names import (
    RUNNING_STATISTICS as RUNNING_STATISTICS,
)
from clip2fl_common.messages.names import (
    SECURE as SECURE,
)
from clip2fl_common.messages.names import (
    SITE as SITE,
)
from clip2fl_common.messages.names import (
    SITE_REFUSES as SITE_REFUSES,
)
from clip2fl_common.messages.names import (
    STREAM as STREAM,
)
from clip2fl_common.messages.names import (
    SUMMED_METRICS as SUMMED_METRICS,
)
from clip2fl_common.messages.names import (
    TEACHER_FINGERPRINT as TEACHER_FINGERPRINT,
)
from clip2fl_common.messages.names import (
    VARIANCE as VARIANCE,
)
from clip2fl_common.messages.sites import (
    Evaluation as Evaluation,
)
from clip2fl_common.messages.sites import (
    may_be_in_card as may_be_in_card,
)
from clip2fl_common.messages.sites import (
    simulated_partition as simulated_partition,
)
from clip2fl_common.messages.sites import (
    site_of as site_of,
)
from clip2fl_common.messages.sites import (
    site_reply as site_reply,
)
from clip2fl_common.messages.sites import (
    versions_of as versions_of,
)
from clip2fl_common.messages.training import (
    TrainReply as TrainReply,
)
from clip2fl_common.messages.training import (
    TrainRequest as TrainRequest,
)
from clip2fl_common.shown import LONGEST_TEXT as LONGEST_TEXT
from clip2fl_common.shown import plain as plain
