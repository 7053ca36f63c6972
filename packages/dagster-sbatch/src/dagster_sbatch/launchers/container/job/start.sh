#!/bin/sh
# Becomes the Python of the image, with the variables of the asset.
# usage: start.sh [--workload] CODE PYTHON ARGUMENT...   (in the container, in the run directory or in that of a task)
# With --workload it records its process, and goes to the folder `work`. The process gets the warning before the time
# limit: the container's runtime is another one, outside, and handles all signals. CODE is the code root: first on
# Python's path, even if the image sets PYTHONPATH. The folder of this file has dagster_pipes, and the variables of the
# asset, which this shell does not set: some may have names that mean something to it.
refuse() {
  echo "$1" >cause
  echo "container: $1" >&2
  exit 127
}
_image=${APPTAINER_CONTAINER:-$SINGULARITY_CONTAINER} _workload=
[ "$1" = --workload ] && _workload=1 && shift
case $PYTHONPATH: in "$1":*) ;; *) PYTHONPATH=$1${PYTHONPATH:+:$PYTHONPATH} ;; esac
shift
# shellcheck source=/dev/null
. "${0%/*}/variables.sh"
command -v "$1" >/dev/null || refuse "The image $_image has no $1, and a Python of the image starts every workload. \
Name it with Container(python=...), or use an image that has Python 3.10 or newer."
_said=$(with_variables "$1" -I -S -V 2>&1) || refuse "$1 in the image $_image does not run: $_said. Name another \
Python with Container(python=...), or build the image again."
(with_variables "$1" -I -S -c 'import sys; sys.exit(sys.version_info < (3, 10))') ||
  refuse "$1 in the image $_image is $_said, and Dagster Pipes needs Python 3.10 or newer. Name another one with \
Container(python=...), or use a newer image."
PYTHON=$(command -v "$1")
export PYTHON PYTHONPATH="$PYTHONPATH:${0%/*}"
if [ "$_workload" ]; then
  echo "$$" >workload.pid
  mkdir -p work && cd ./work || exit
fi
with_variables "$@"
