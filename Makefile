# rmig: build the examples, check, measure, install. `make help` says what there is.

ifeq ($(origin CC),default)
CC := gcc
endif
CLANG ?= clang
CFLAGS ?= -O2 -g
WARN := -Wall -Wextra -Wpedantic -Wconversion -Wshadow
STD := -std=c11
PREFIX ?= /usr/local
DESTDIR ?=
FUZZ_SECONDS ?= 60
JOBS ?= $(shell nproc)
B := build
export B
Q := $(if $(V),,@)

HEADERS := $(wildcard rmig*.h)
EXAMPLES := $(patsubst examples/%.c,%,$(wildcard examples/*.c))
BENCHES := $(patsubst bench/%.c,%,$(wildcard bench/*.c))
FUZZERS := $(patsubst tests/%.c,%,$(wildcard tests/fuzz_*.c))
SUITES := $(filter-out $(FUZZERS),$(patsubst tests/%.c,%,$(wildcard tests/*.c)))
UNIT := $(filter unit_%,$(SUITES))

# `make check` runs every suite with ASan and UBSan, and those plain that do less with them; those that have threads also
# with TSan, under which Criterion does not run; the unit suites also with each macro that rmig.h takes, several in a
# variant, and with clang. `make quick` runs every suite plain.
WITHOUT_ASAN := random_migration handover
TSAN_SUITES := $(filter threads%,$(SUITES))
SWITCHES := private namespace clang
# Not under ThreadSanitizer, which does not see that liburing maps and unmaps.
URING := -DRMIG_MAPPED_URING
FLAGS_plain := -O1 -g $(URING)
# With a private copy of the headers a program has only those of their functions that it calls, and the sanitizers make
# each several times as long. (-fwhole-program would also drop Criterion's parameterised tests, and say nothing.) With
# the runtime linked into it a program starts in two thirds of the time, and Criterion starts it for each test; those
# are gcc's words, clang does so by itself.
FLAGS_asan := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -DRMIG_STATIC \
	$(URING) $(if $(findstring clang,$(CC)),,-static-libasan -static-libubsan)
FLAGS_tsan := -O1 -g -fsanitize=thread
# Those for RDMA devices fork for each test: where the machine is emulated, a process with all of Criterion's libraries is
# most of what a test costs.
DEVICE_SUITES := fabric_conformance rdma hostile_peer
FLAGS_devices := -O1 -g -DRMIG_TEST_VERBS -isystem tests/arch
LIBS_devices = $$(pkg-config --cflags --libs $(RDMA_LIBS)) -pthread
# The variants of the unit suites repeat less: what differs is how they are compiled.
FLAGS_private := -O1 -DTEST_FEW -DRMIG_STATIC -include tests/override.h
FLAGS_namespace := -O3 -DTEST_FEW -DNDEBUG -DRMIG_NAMESPACE=acme_ $(URING)
FLAGS_clang := -O2 -DTEST_FEW -DRMIG_CHUNK_SIZE=67108864
CC_clang := $(CLANG)

# On machines of other kinds, under qemu-user: what needs no device. Those whose compiler is here.
ARCH_SUITES := unit_wire unit_params unit_blocks unit_chunk_merge unit_zero unit_qemu random_migration
ARCHES := $(foreach a,s390x aarch64,$(if $(shell command -v $(a)-linux-gnu-gcc),$(a)))
define arch_flags
CC_$(1) := $(1)-linux-gnu-gcc
FLAGS_$(1) := -Og -D_DEFAULT_SOURCE -DARCH_HIDES_PAGEMAP -isystem tests/arch
LIBS_$(1) := -static -pthread -Wl,--wrap=open
$(addprefix $(B)/$(1)/,$(ARCH_SUITES)): tests/arch/criterion/criterion.h
endef
$(foreach a,$(ARCHES),$(eval $(call arch_flags,$(a))))

# What each kind of program links with; asked for in recipes, since `make deps` may install it in the same run.
RDMA_LIBS := libfabric libibverbs librdmacm
EXAMPLE_LIBS := $(URING) -Wl,--as-needed $$(pkg-config --cflags --libs $(RDMA_LIBS) jansson liburing) -pthread
TEST_LIBS := -Wl,--as-needed $$(pkg-config --cflags --libs criterion $(RDMA_LIBS) jansson liburing) -pthread

# Packages of Debian and its kin.
PACKAGES := gcc g++ libc6-dev pkg-config perl procps libfabric-dev libibverbs-dev librdmacm-dev libjansson-dev \
	liburing-dev libcriterion-dev clang libclang-rt-dev clang-tidy cppcheck valgrind \
	qemu-system-x86 ibverbs-providers rdmacm-utils perftest iproute2 xz-utils binutils strace e2fsprogs \
	gcc-s390x-linux-gnu libc6-dev-s390x-cross gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
BENCH_PACKAGES := gnuplot-nox
DEBIAN13_PACKAGES := debootstrap

# With `make deps demo` nothing may be compiled before the packages are there, with -j too.
AFTER_DEPS := $(filter deps deps-bench deps-debian13,$(MAKECMDGOALS))

all: examples
examples: $(addprefix $(B)/,$(EXAMPLES))

help:
	@echo 'make                  build the examples into $(B)/'
	@echo 'make deps             install the Debian packages that are missing (apt-get, sudo if need be)'
	@echo 'make demo             live-migrate a small running virtual machine between two processes here'
	@echo 'make check            every test, every build variant, static analysis, a short fuzz'
	@echo 'make quick            every suite once, as it comes'
	@echo 'make check-rdma       over RoCE and iWARP alone, in a VM; RDMA_DEV= RDMA_ADDR= [RDMA_ADDR6=]: on that adapter'
	@echo 'make check-debian13   the commands of README in a fresh Debian 13 (root; make deps-debian13)'
	@echo 'make check-arch       the suites without devices on s390x and aarch64, under qemu-user'
	@echo 'make soak             random migrations with fresh seeds, SECONDS=600; those that fail go to $(B)/soak/failed'
	@echo 'make record           what can be seen of rmig, into DIR=$(B)/record: for diff -r, before a change and after it'
	@echo 'make lint             clang-tidy and cppcheck'
	@echo 'make fuzz             fuzz the decoders, FUZZ_SECONDS=60 for each target'
	@echo 'make costs            what any machine measures alike, against bench/costs.limits, into $(B)/costs.json'
	@echo 'make figures          the numbers in README.md and docs/bench.svg, from the simulator'
	@echo 'make bench            measure throughput, beside raw libfabric and stock QEMU'
	@echo 'make bench-rdma       measure over RoCE and iWARP in software, in a VM'
	@echo 'make bench-file       measure snapshot files, beside dd and QEMU (4 GiB; root, for a cold page cache; make deps-bench)'
	@echo 'make install          headers and rmig.pc, PREFIX=/usr/local DESTDIR='
	@echo 'make uninstall        remove them'
	@echo 'make clean            remove $(B)/'
	@echo 'Variables: V=1 (show commands) CC CLANG CFLAGS LDFLAGS PREFIX DESTDIR JOBS FUZZ_SECONDS SECONDS'

deps:
	@.ci/deps $(PACKAGES)

deps-bench:
	@.ci/deps $(PACKAGES) $(BENCH_PACKAGES)

deps-debian13:
	@.ci/deps $(PACKAGES) $(DEBIAN13_PACKAGES)

demo: $(B)/kvm_live
	$(B)/kvm_live demo --json $(B)/demo.json

# >>programs

$(addprefix $(B)/,$(EXAMPLES)): $(B)/%: examples/%.c | $(AFTER_DEPS)
	@mkdir -p $(@D) && echo "  build $@"
	$(Q)$(CC) $(STD) $(WARN) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d $< -o $@ $(LDFLAGS) $(EXAMPLE_LIBS)

$(addprefix $(B)/asan/,$(EXAMPLES)): $(B)/asan/%: examples/%.c | $(AFTER_DEPS)
	@mkdir -p $(@D) && echo "  build $@"
	$(Q)$(CC) $(STD) $(WARN) -Werror $(FLAGS_asan) -MMD -MP -MF $@.d $< -o $@ $(EXAMPLE_LIBS)

$(addprefix $(B)/bench/,$(BENCHES)): $(B)/bench/%: bench/%.c | $(AFTER_DEPS)
	@mkdir -p $(@D) && echo "  build $@"
	$(Q)$(CC) $(STD) $(WARN) $(CPPFLAGS) $(CFLAGS) -MMD -MP -MF $@.d $< -o $@ $(LDFLAGS) $(EXAMPLE_LIBS)

# Compiled the same way always: their instructions are counted.
COSTS := $(addprefix $(B)/costs/,sim core)
$(COSTS): $(B)/costs/%: bench/%.c | $(AFTER_DEPS)
	@mkdir -p $(@D) && echo "  build $@"
	$(Q)gcc $(STD) $(WARN) -Werror -O2 -g -MMD -MP -MF $@.d $< -o $@

$(addprefix $(B)/fuzz/,$(FUZZERS)): $(B)/fuzz/%: tests/%.c | $(AFTER_DEPS)
	@mkdir -p $(@D) && echo "  build $@"
	$(Q)$(CLANG) $(STD) $(WARN) -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DRMIG_STATIC \
		-MMD -MP -MF $@.d $< -o $@ -lfabric

define test_rules
$$(addprefix $(B)/$(1)/,$(2)): $(B)/$(1)/%: tests/%.c $$(wildcard tests/override.h) | $$(AFTER_DEPS)
	@mkdir -p $$(@D) && echo "  build $$@"
	$$(Q)$$(or $$(CC_$(1)),$$(CC)) $$(STD) $$(WARN) -Werror $$(FLAGS_$(1)) -MMD -MP -MF $$@.d $$< -o $$@ $$(or $$(LIBS_$(1)),$$(TEST_LIBS))
TEST_BINARIES += $$(addprefix $(B)/$(1)/,$(2))
endef
$(eval $(call test_rules,plain,$(SUITES)))
$(eval $(call test_rules,asan,$(SUITES)))
$(eval $(call test_rules,tsan,$(TSAN_SUITES)))
$(eval $(call test_rules,devices,$(DEVICE_SUITES)))
$(addprefix $(B)/devices/,$(DEVICE_SUITES)): $(wildcard tests/arch/criterion/*.h)
$(foreach s,$(SWITCHES),$(eval $(call test_rules,$(s),$(UNIT))))
$(foreach a,$(ARCHES),$(eval $(call test_rules,$(a),$(ARCH_SUITES))))

FUZZ_BINARIES := $(addprefix $(B)/fuzz/,$(FUZZERS))
# Plain ones: those that `make check` runs so, on this machine and under valgrind.
PLAIN := $(addprefix $(B)/plain/,$(WITHOUT_ASAN) unit_params unit_blocks unit_wire)
CHECK_BINARIES := $(PLAIN) $(filter-out $(B)/plain/%,$(TEST_BINARIES)) $(FUZZ_BINARIES) $(addprefix $(B)/,$(EXAMPLES)) \
	$(addprefix $(B)/asan/,$(EXAMPLES)) $(COSTS) $(B)/bench/report

-include $(addsuffix .d,$(sort $(CHECK_BINARIES) $(TEST_BINARIES))) $(wildcard $(B)/bench/*.d)

# >>checks
# One line a program: how it reports, its name, its limit in seconds, the command. tests/run.pl runs and counts them; the
# longest come first.
# A limit is for what hangs: ten times what the program takes on a machine of its own, and at least ten minutes.

CRITERION := $(shell grep -ls 'criterion/' $(addsuffix .c,$(addprefix tests/,$(SUITES))))
kind = $(if $(filter tests/$(1).c,$(CRITERION)),criterion,status)
suite_lines = $(foreach s,$(2),'$(call kind,$(s)) $(1)/$(s) 2400 $(B)/$(1)/$(s)')
program_lines = 'tap integration/migrate$(2) 2400 tests/migrate.sh $(B)/$(1)rmig_migrate' \
	'tap integration/minimal$(2) 600 tests/minimal.sh $(B)/$(1)minimal'
INTEGRATION_LINES := 'tap integration/kvm_live 1200 tests/kvm_live.sh $(B)/kvm_live' \
	'tap integration/qemu 2400 tests/qemu_examples.sh $(B)/qemu_sink $(B)/qemu_source' \
	'tap integration/mapped_ram 2400 tests/mapped_ram.sh $(B)/mapped_ram $(B)' \
	'tap soak 600 tests/soak_tool.sh $(B)/plain/random_migration' \
	'tap readme 600 tests/readme.sh $(B)/rmig_migrate' \
	'tap quick_start 1200 tests/quick_start.sh'
QUICK_LINES = $(call suite_lines,plain,$(SUITES)) $(call program_lines) $(INTEGRATION_LINES)
# Over RDMA devices: in virtual machines, or on the adapter that is named. The longest come first.
RDMA_DEV ?=
RDMA_BINARIES := $(addprefix $(B)/,$(addprefix devices/,$(DEVICE_SUITES)) rmig_migrate kvm_live \
	qemu_sink qemu_source asan/qemu_sink asan/qemu_source)
rdma_line = 'tap rdma/$(subst $() ,-,$(1)) 3600 tests/rdma.sh $(B) $(1)'
VM_LINES := 'tap rdma/qemu 3600 tests/qemu_peer.sh $(B) moves runs refuses libfabric asan' \
	'tap rdma/qemu-chunks 3600 tests/qemu_peer.sh $(B) chunks' \
	'tap rdma/qemu-files 3600 tests/qemu_peer.sh $(B) files' \
	$(call rdma_line,rxe ofi) $(call rdma_line,siw migrate limits link) \
	$(call rdma_line,rxe conformance session limits) $(call rdma_line,siw conformance session) \
	$(call rdma_line,rxe hostile migrate link)
RDMA_LINES = $(if $(RDMA_DEV),$(call rdma_line,here conformance ofi session migrate hostile),$(VM_LINES))
ARCH_LINES := 'tap arch 2400 tests/arch.sh $(B) $(ARCH_SUITES)'
LINT_LINES := 'tap lint 2400 tests/lint.sh'
FUZZ_LINES = 'tap fuzz 86400 tests/fuzz.sh $(1) $(FUZZ_BINARIES)'
CHECK_LINES = $(LINT_LINES) 'tap headers 2400 tests/headers.sh' 'tap layers 600 tests/layers.sh' $(VM_LINES) $(INTEGRATION_LINES) \
	$(call program_lines,asan/,-asan) $(call suite_lines,asan,$(SUITES)) $(call suite_lines,plain,$(WITHOUT_ASAN)) \
	$(call suite_lines,tsan,$(TSAN_SUITES)) $(foreach s,$(SWITCHES),$(call suite_lines,$(s),$(UNIT))) \
	'tap costs 1200 bench/costs.sh $(B)' \
	'tap figures 1200 bench/figures.sh $(B) check' \
	'tap valgrind 2400 tests/valgrind.sh $(B)/minimal $(B)/plain' \
	'tap install 600 tests/install.sh' \
	$(ARCH_LINES) $(call FUZZ_LINES,5)

# $(1): what to build first. $(2): lines to run. A program that does not build is a failure, and the rest still runs.
# Two lines more than there are cores: most lines wait for something at times.
run_lines = mkdir -p $(B); built=0; \
	$(if $(1),$(MAKE) -k --no-print-directory $(if $(findstring -j,$(MAKEFLAGS)),,-j$(JOBS)) $(1) || built=$$?;) \
	printf '%s\n' $(2) >$(B)/check.list && perl tests/run.pl --built $$built --jobs $$(($(JOBS) + 2)) --out $(B)/log $(B)/check.list

check: | $(AFTER_DEPS)
	@$(call run_lines,check-binaries,$(CHECK_LINES))

quick: | $(AFTER_DEPS)
	@$(call run_lines,quick-binaries,$(QUICK_LINES))

ifneq ($(RDMA_DEV),)
export RMIG_TEST_DEVICE := $(RDMA_DEV)
export RMIG_TEST_ADDR := $(RDMA_ADDR)
ifneq ($(RDMA_ADDR6),)
export RMIG_TEST_ADDR6 := $(RDMA_ADDR6)
endif
endif

check-rdma: | $(AFTER_DEPS)
	@$(call run_lines,$(RDMA_BINARIES),$(RDMA_LINES))

check-debian13: | $(AFTER_DEPS)
	@$(call run_lines,,'tap debian13 7200 tests/debian13.sh $(B)')

check-arch: | $(AFTER_DEPS)
	@$(call run_lines,arch-binaries,$(ARCH_LINES))

SOAK := $(addsuffix /random_migration,$(B)/plain $(B)/asan)
SECONDS ?= 600
soak: $(SOAK) | $(AFTER_DEPS)
	@tests/soak.sh $(SECONDS) $(JOBS) $(B)/soak $(SOAK)

record: $(B)/plain/random_migration $(COSTS) $(B)/bench/report | $(AFTER_DEPS)
	@tests/record.sh $(B) $(or $(DIR),$(B)/record)

lint: | $(AFTER_DEPS)
	@$(call run_lines,,$(LINT_LINES))

fuzz: | $(AFTER_DEPS)
	@$(call run_lines,$(FUZZ_BINARIES),$(call FUZZ_LINES,$(FUZZ_SECONDS)))

check-binaries: $(CHECK_BINARIES)
arch-binaries: $(foreach a,$(ARCHES),$(addprefix $(B)/$(a)/,$(ARCH_SUITES)))
quick-binaries: $(addprefix $(B)/plain/,$(SUITES)) $(addprefix $(B)/,$(EXAMPLES))

costs: $(COSTS) $(B)/bench/report | $(AFTER_DEPS)
	bench/costs.sh $(B)

figures: $(COSTS) | $(AFTER_DEPS)
	bench/figures.sh $(B)

bench-rdma: $(B)/bench/report $(B)/rmig_migrate | $(AFTER_DEPS)
	bench/rdma.sh $(B)

bench-file: $(addprefix $(B)/bench/,file report) $(B)/kvm_live | $(AFTER_DEPS)
	bench/file.sh $(B)

bench: $(addprefix $(B)/bench/,$(BENCHES)) examples | $(AFTER_DEPS)
	bench/run.sh $(B)

# >>install

VERSION = $$(awk '$$2 ~ /^RMIG_VERSION_(MAJOR|MINOR|PATCH)$$/ { v = v s $$3; s = "." } END { print v }' rmig.h)

install:
	install -d '$(DESTDIR)$(PREFIX)/include' '$(DESTDIR)$(PREFIX)/lib/pkgconfig'
	install -m 644 $(HEADERS) '$(DESTDIR)$(PREFIX)/include'
	printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' '' 'Name: rmig' \
		'Description: live migration of VM memory by RDMA, header-only' "Version: $(VERSION)" \
		'Cflags: -I$${includedir}' >'$(DESTDIR)$(PREFIX)/lib/pkgconfig/rmig.pc'

uninstall:
	rm -f $(foreach h,$(HEADERS),'$(DESTDIR)$(PREFIX)/include/$(h)') '$(DESTDIR)$(PREFIX)/lib/pkgconfig/rmig.pc'

clean:
	rm -rf $(B)

.PHONY: all examples help deps deps-bench deps-debian13 demo check quick check-rdma check-debian13 check-arch soak record lint \
	fuzz check-binaries quick-binaries arch-binaries costs figures bench bench-rdma bench-file install uninstall clean
.DELETE_ON_ERROR:
