# Every target installs what it needs first; `scripts/install` does nothing when all is there.
.PHONY: help install demo test lint fix types coverage bench mutants model torture check-full ci

help:           ## Show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install:        ## Make .venv hold the project and its tools
	@scripts/install

demo: install   ## Run the example service against a fake provider, and show what comes back
	@scripts/demo

test: install   ## Run the tests
	@scripts/test

lint: install   ## Check form and lint
	@scripts/lint

fix: install    ## Repair form and lint where possible
	@scripts/lint --fix

types: install  ## Check types, strictly
	@scripts/types

coverage: install ## Run the tests and report branch coverage
	@scripts/coverage

bench: install  ## Run the benchmarks; results on the screen
	@scripts/bench

mutants: install ## Break the code in small ways and list what no test notices
	@scripts/mutants

model:          ## Check the model of reserve, settle, lapse and lease in every state
	@scripts/model

torture: install ## Kill and cut off processes that make calls, for two minutes; compare the books
	@scripts/torture

check-full: install ## Run the long tests as well
	@scripts/check-full

ci:             ## Everything that a change has to pass
	@.ci/run
