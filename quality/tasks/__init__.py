"""Problems with an exact verifier, solved in steps whose wording carries no meaning."""

from quality.tasks.addition import Addition
from quality.tasks.sorting import Sorting
from quality.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (Addition(), Sorting())}
