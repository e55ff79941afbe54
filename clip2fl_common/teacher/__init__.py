"""The teacher, a frozen CLIP model, and the caches of its features and facts."""

from clip2fl_common.teacher.teacher import DEMO as DEMO
from clip2fl_common.teacher.teacher import HUB_PREFIX as HUB_PREFIX
from clip2fl_common.teacher.teacher import LOCAL_PREFIX as LOCAL_PREFIX
from clip2fl_common.teacher.teacher import Network as Network
from clip2fl_common.teacher.teacher import OtherTeacherError as OtherTeacherError
from clip2fl_common.teacher.teacher import Teacher as Teacher
from clip2fl_common.teacher.teacher import TeacherError as TeacherError
from clip2fl_common.teacher.teacher import load_teacher as load_teacher
from clip2fl_common.teacher.teacher import public_name as public_name
