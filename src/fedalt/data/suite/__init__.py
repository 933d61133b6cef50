"""Eight small generated tasks, partly related and partly in conflict, for demos and tests."""

from fedalt.data.suite.tasks import TASKS, distinct_prompts, generate, generate_clients
from fedalt.data.suite.write import write_suite

__all__ = ["TASKS", "distinct_prompts", "generate", "generate_clients", "write_suite"]
