"""The run configuration: parsed and checked once, typed everywhere after that.

``schema.py`` declares every key once. The other files read and check the keys and write
the error messages. None of them imports torch or flwr, so a wrong setting is refused at
once.
"""

from clip2fl_common.config.checks import HUB_NAME as HUB_NAME
from clip2fl_common.config.checks import SITES as SITES
from clip2fl_common.config.schema import EMA as EMA
from clip2fl_common.config.schema import KEYS as KEYS
from clip2fl_common.config.schema import Aggregation as Aggregation
from clip2fl_common.config.schema import Dataset as Dataset
from clip2fl_common.config.schema import Distillation as Distillation
from clip2fl_common.config.schema import Partition as Partition
from clip2fl_common.config.schema import Privacy as Privacy
from clip2fl_common.config.schema import Retraining as Retraining
from clip2fl_common.config.schema import RunConfig as RunConfig
from clip2fl_common.config.schema import Synthesis as Synthesis
from clip2fl_common.config.schema import TeacherConfig as TeacherConfig
from clip2fl_common.config.schema import Upload as Upload
from clip2fl_common.config.schema import defaults as defaults
from clip2fl_common.config.schema import known_keys as known_keys
from clip2fl_common.config.types import GRADIENT_METHODS as GRADIENT_METHODS
from clip2fl_common.config.types import TEACHER_METHODS as TEACHER_METHODS
from clip2fl_common.config.types import ConfigError as ConfigError
from clip2fl_common.config.types import Scalar as Scalar
from clip2fl_common.config.types import listed_names as listed_names
