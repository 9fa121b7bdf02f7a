# Short names for what tools/ does; the scripts are the truth.
.PHONY: check test quickstart format

check: ## the checks and the quick unit tests, before each commit
	bash tools/test.sh --fast

test: ## everything, as CI runs it
	bash tools/test.sh

quickstart: ## all three stages on real pictures, on this machine
	bash tools/quickstart.sh

format: ## rewrite the code as `make check` wants it
	bash -c '. tools/setup_env.sh && ruff format . && ruff check --fix .'
