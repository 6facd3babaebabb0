# Everything that is done to this project is a target here; `make help` lists them.
GO        ?= go
BIN       := bin
PKGS      := ./...
FUZZTIME  ?= 30s
RUNDIR    ?= run
DOCS      ?= docs
BENCH     ?=
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.6.1
CHECKLOCKS  := gvisor.dev/gvisor/tools/checklocks/cmd/checklocks@v0.0.0-20260905035102-160fafc42237

.DEFAULT_GOAL := help
.PHONY: help build run test tools check race lint locks fuzz meta geometry sealed crash hostile storm migration guest load starts golden bench man generate generate-check tidy-check interop clean FORCE

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

build: ## build bin/qblockd and bin/qblockctl
	@mkdir -p $(BIN)
	$(GO) build -o $(BIN)/ ./cmd/qblockd ./cmd/qblockctl

run: build ## build and start qblockd on a disk of its own under ./run
	./$(BIN)/qblockd --quickstart $(RUNDIR)

tools: ## install the outside tools that the tests use (Debian, as root; else nothing)
	@sh tests/tools.sh

test: tools build ## install what is needed where that is possible, then run all tests
	$(GO) vet $(PKGS)
	$(GO) test -timeout 15m $(PKGS)
	@sh tests/tools.sh missing

check: lint generate-check tidy-check test race ## all that must pass before a merge

race: ## all tests under the race detector and with invariants checked
	$(GO) test -race -tags invariants -timeout 25m $(PKGS)

lint: locks ## gofmt, vet, staticcheck, checklocks
	@bad=$$(gofmt -l .); test -z "$$bad" || { echo "not as gofmt writes it:" $$bad; exit 1; }
	$(GO) vet $(PKGS)
	$(GO) run $(STATICCHECK) $(PKGS)

locks: ## locks are held where the +checklocks annotations say so
	GOBIN=$(abspath $(BIN)) $(GO) install $(CHECKLOCKS)
	$(GO) vet -vettool=$(abspath $(BIN))/checklocks -inferred=false -wrappers=false $(PKGS)

man: ## write the manual pages and the shells' completions to docs/man and docs/completion (or below DOCS)
	$(GO) test -count=1 ./cmd/qblockd ./cmd/qblockctl -run TestManPage -args -update -docs=$(abspath $(DOCS))

generate: ## rewrite what is generated from schema/qapi
	$(GO) generate ./schema/...

generate-check: generate ## generated files are up to date
	git diff --exit-code -- schema

tidy-check: ## go.mod and go.sum are tidy
	$(GO) mod tidy -diff

fuzz: ## every fuzz target for FUZZTIME each
	@sh tests/fuzz.sh $(FUZZTIME)

SEED   ?= 1
SEEDS  ?= 1000
OPS    ?= 120
SAMPLES ?= 10000
ROUNDS ?= 200

meta: ## random operations on a graph against plain bytes: SEED= first seed, SEEDS= how many, OPS= operations of each
	$(GO) test -count=1 -timeout 0 ./tests/meta -run TestRandom -meta.seed $(SEED) -meta.seeds $(SEEDS) -meta.ops $(OPS)

geometry: ## all jobs over disks of all shapes against plain bytes: SEED= first seed, SAMPLES= how many
	$(GO) test -count=1 -timeout 0 ./tests/geometry -run TestSamples -v -geometry.seed $(SEED) -geometry.samples $(SAMPLES)

TRIALS ?= 200

sealed: ## chains of encrypted images under everything that changes them: SEED= first seed, TRIALS= how many
	$(GO) test -count=1 -timeout 0 -v ./tests/sealed -run TestTrials -sealed.seed $(SEED) -sealed.trials $(TRIALS)

crash: ## ROUNDS= rounds of kill -9 under load
	$(GO) test -count=1 -timeout 0 -v ./tests/crash -run TestKill -crash.rounds $(ROUNDS) -crash.seed $(SEED)

MOVES ?= 20

migration: ## MOVES= migrations between two daemons whose wire is cut, half as many with the source killed
	$(GO) test -count=1 -timeout 0 -v ./tests/migration -migration.rounds $(MOVES) -migration.seed $(SEED)

guest: ROUNDS = 20
guest: tools ## ROUNDS= virtual machines above vhost-user-blk exports, from SEED= on, with the daemon killed under half of them
	$(GO) test -count=1 -timeout 0 -v ./tests/guest -run TestRounds -guest.rounds $(ROUNDS) -guest.seed $(SEED) -guest.binary "$(SUBJECT)"

CASES  ?= 20000
BINARY ?=

hostile: ## CASES= damaged images, drawn from SEED=, on a real daemon (BINARY= another one than this tree's)
	$(GO) test -count=1 -timeout 0 -v ./tests/hostile -run TestHunt -hostile.cases $(CASES) -hostile.seed $(SEED) -hostile.binary "$(BINARY)"

STORM_TIME ?= 30m
CLIENTS    ?= 6
SUBJECT    ?=

storm: ## all commands by CLIENTS= at once on few nodes, for STORM_TIME=, from SEED= on (SUBJECT= another binary than this tree's)
	$(GO) test -count=1 -timeout 0 -v ./tests/storm -run TestStorm -storm.time $(STORM_TIME) -storm.clients $(CLIENTS) -storm.seed $(SEED) -storm.binary "$(SUBJECT)"

STARTS ?= 2000

load: ## thousands of idle and deaf clients, limits, clients that come during the start
	$(GO) test -count=1 -v ./tests/load

starts: ## STARTS= starts of the daemon with a client at the door
	$(GO) test -count=1 -timeout 0 -v ./tests/load -run TestStarts -load.starts $(STARTS)

golden: build ## rewrite the recorded conversations in tests/conv from qblockd; review the diff as behaviour
	$(GO) test ./tests/conv -run TestConversations -update

interop: build ## the tests with real clients and QEMU's tools only
	$(GO) test -count=1 -v ./tests/interop/...

bench: ## Go benchmarks, then the loads of tests/bench on qblockd and its peers by turns (BENCH=-quick: shorter)
	$(GO) test -run '^$$' -bench . -benchtime 0.1s -benchmem $(PKGS)
	$(GO) run ./tests/bench $(BENCH)

clean: ## remove what was built
	rm -rf $(BIN) $(RUNDIR)
