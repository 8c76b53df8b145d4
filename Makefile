# make run      build, serve an export from a store in $(DATA), print the mount command
# make check    fast tests, about three minutes on two cores, no privileges needed
# make test     everything: unit tests, real kernel client, libnfs, benchmark smoke test (root)
# make bench    compare with nfs-ganesha (root), tables on standard output
# make demo     a floating address moves under a real kernel client: a timeline (root)
# make deb      a Debian package in dist/
# make fuzz     all fuzz targets, FUZZTIME each

GO          ?= go
DATA        ?= ./baton-data
FUZZTIME    ?= 60s
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.7.0
BENCHFLAGS  ?= -scale 1000000 -json bench.json -markdown bench.md

# Packages whose concurrency matters most; the race detector runs on them in check.
RACE = ./internal/sunrpc/... ./internal/workers/... ./internal/xdr/... ./recovery/target/... ./recovery/client/... ./recovery/locks/... ./recovery/mdt/... \
	./recovery/wire/... ./recovery/mgs/... ./recovery/host/... ./nfsd/... ./lockd/... ./statd/... ./vip/... \
	./failover/... ./internal/vipagent/...
# What check runs without it.
REST = $(filter-out $(shell $(GO) list $(RACE)),$(shell $(GO) list ./...))
# Everything but the black-box suites.
UNIT = $(shell $(GO) list ./... | grep -v /tests/)
# Suites that must not end without a passed test.
SUITES = tests/bed,tests/uml,tests/kernel,tests/libnfs,tests/bench,tests/cluster,tests/sim,tests/moves,tests/moves/rig,tests/hooks,tests/systemd

.PHONY: build run check lint test bench bench-quick demo fuzz fuzz-short deb clean

build:
	CGO_ENABLED=0 $(GO) build -o baton ./cmd/baton

# Unprivileged ports, so that it runs for everyone; mounting needs root anyway.
run: build
	./baton serve --data $(DATA) --export /export=/ --export-options rw,insecure,no_root_squash \
		--port 12049 --rpcbind off --http off

lint:
	@out="$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go'))"; if [ -n "$$out" ]; then echo "not gofmt-clean:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

check: lint
	$(GO) test -short $(REST)
	$(GO) test -short -race $(RACE)

# Each suite has the machine for itself (-p 1): they have time limits.
test:
	sh tests/install.sh
	$(MAKE) lint fuzz-short
	@{ \
	  $(GO) test -json -timeout 15m $(UNIT) 2>&1; \
	  $(GO) test -json -short -race -timeout 15m $(RACE) 2>&1; \
	  BATON_KERNEL=1 $(GO) test -json -p 1 -count=1 -timeout 45m ./tests/... 2>&1; \
	} | $(GO) run ./tests/summary -require $(SUITES)

bench:
	sh tests/install.sh
	$(GO) run ./tests/bench $(BENCHFLAGS)

bench-quick:
	$(GO) run ./tests/bench -rounds 1 -seconds 0.5

demo:
	sh tests/install.sh
	$(GO) run ./tests/demo

deb:
	sh packaging/deb/build.sh dist

# Every fuzz target for FUZZTIME (fuzz) or a moment (fuzz-short): `go test` takes
# one target at a time.
fuzz:
	sh tests/fuzz.sh $(FUZZTIME)

fuzz-short:
	sh tests/fuzz.sh 2000x

clean:
	rm -rf baton baton-data dist bench.json bench.md
