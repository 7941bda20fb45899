#!/bin/sh
# The pipeline that an engineer starts: it knows nothing of databases, it starts agent A with what it was told.
exec "${AGENT_PYTHON:-python3}" "$(dirname "$0")/agent_a.py" "$@"
