#!/usr/bin/env bash
# Installs the libraries of docs/libraries.md where they are missing, and runs their tests. Arguments go to pytest.
source "$(dirname "$0")/common.sh"
find_python
need accelerate transformers lightning || die "accelerate, transformers and lightning are needed"
exec bash scripts/test.sh tests/libraries "$@"
