#!/bin/sh
# Becomes the Python of the image.
# usage: start.sh [--workload] PYTHON ARGUMENT...   (in the container, in the run directory or in that of a task)
# With --workload it records its process, which gets the warning before the time limit: the container's runtime is
# another process, outside, and handles all signals. The folder of this file has dagster_pipes.
refuse() {
  echo "$1" >cause
  echo "container: $1" >&2
  exit 127
}
[ "$1" = --workload ] && workload=1 && shift
command -v "$1" >/dev/null || refuse "The image ${APPTAINER_CONTAINER:-} has no $1, and a Python of the image starts \
every workload. Name it with Container(python=...), or use an image that has Python 3.10 or newer."
"$1" -I -S -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  refuse "$1 in the image ${APPTAINER_CONTAINER:-} is $("$1" -V 2>&1), and Dagster Pipes needs Python 3.10 or newer. \
Name another one with Container(python=...), or use a newer image."
PYTHON=$(command -v "$1")
export PYTHON PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}${0%/*}"
[ -z "$workload" ] || echo "$$" >workload.pid
exec "$@"
