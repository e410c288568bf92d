#!/usr/bin/env perl
# run.pl [--built STATUS] [--jobs N] [--out DIR] LIST
# Runs the programs of LIST, N at a time. A line is KIND NAME SECONDS COMMAND; KIND says how the program reports:
#   tap        TAP on its standard output
#   criterion  TAP in the file that --tap=FILE names
#   status     its exit status alone
# A program that passes gets one line, one that fails is shown in full. The last line is the sum over everything.
use strict;
use warnings;
use File::Path qw(make_path);
use Getopt::Long;
use TAP::Parser;
use Time::HiRes qw(time);

my ($built, $jobs, $out) = (0, 1, 'build/log');
GetOptions('built=i' => \$built, 'jobs=i' => \$jobs, 'out=s' => \$out) && @ARGV == 1
    or die "usage: run.pl [--built STATUS] [--jobs N] [--out DIR] LIST\n";
make_path($out);
unlink "$out/summary";
delete @ENV{qw(MAKEFLAGS MFLAGS MAKELEVEL)};
$ENV{UBSAN_OPTIONS} //= 'print_stacktrace=1';
# With tests in parallel Criterion 2.4.1 leaks 48 bytes of its own, and LeakSanitizer cannot tell whose they are; programs run in
# parallel anyway.
$ENV{CRITERION_JOBS} //= 1;
$ENV{LSAN_OPTIONS} //= 'suppressions=tests/lsan.supp:print_suppressions=0';
$ENV{TSAN_OPTIONS} //= 'ignore_noninstrumented_modules=1';
$| = 1;

sub slurp {
    my ($path) = @_;
    open my $in, '<', $path or return '';
    local $/;
    return scalar(<$in>) // '';
}

sub judge_tap {
    my ($r, $tap) = @_;
    if ($tap !~ /\S/) {
        $r->{failed}++;
        push @{$r->{why}}, "it reported nothing";
        return;
    }
    # Without its version line the parser leaves Criterion's YAML alone, of which it knows only a part.
    $tap =~ s/^TAP version \d+\n//;
    my $parser = TAP::Parser->new({tap => $tap});
    while (my $result = $parser->next) {
        next unless $result->is_test;
        my ($text, $why) = ($result->description, $result->explanation);
        if (!$result->has_skip) {
            $r->{$result->is_ok ? 'passed' : 'failed'}++;
        } elsif ($ENV{CI} && $why =~ /not installed/) {
            $r->{failed}++;
            push @{$r->{why}}, "skipped, which is a failure here: $text: $why";
        } else {
            $r->{skipped}++;
            push @{$r->{why}}, "skipped: $text: $why";
        }
    }
    my @errors = $parser->parse_errors or return;
    $r->{failed}++;
    push @{$r->{why}}, "its report is not whole: @errors";
}

# What a program said and how it ended: passed, failed, skipped, why.
sub judge {
    my ($kind, $tap, $status) = @_;
    my $r = {passed => 0, failed => 0, skipped => 0, why => []};
    if ($kind eq 'status') {
        $r->{$status == 0 ? 'passed' : 'failed'}++;
    } else {
        judge_tap($r, $tap);
    }
    if ($status == 124 || $status == 137) {
        $r->{failed}++;
        push @{$r->{why}}, 'it was stopped: its time was over';
    } elsif ($status != 0 && $r->{failed} == 0) {
        $r->{failed}++;
        push @{$r->{why}}, "it ended with status $status";
    }
    return $r;
}

# Criterion starts the program for each test, and libraries read files then that no test needs, which takes more time
# than the rest of the start: libfabric's verbs provider the kernel's symbols; libgit2, of Criterion's, all certificates;
# the leak sanitizer, before it leaves out what tests/lsan.supp names, what Debian has of debug information for the C
# library, without which valgrind would not start. Root can give the programs empty ones.
sub hide {
    my ($kind) = @_;
    my @commands = map { "mount --bind /dev/null $_" } grep { -e } qw(/proc/kallsyms /etc/ssl/certs/ca-certificates.crt);
    push @commands, 'mount -t tmpfs none /usr/lib/debug' if $kind eq 'criterion' && -e '/usr/lib/debug';
    return join ' && ', @commands, 'true';
}
my $can_hide = $> == 0 && system("unshare --mount sh -c '" . hide('criterion') . "' 2>/dev/null") == 0;

# The first file that the command names and that is not there.
sub missing_file {
    my ($command) = @_;
    my ($missing) = grep { m{^[\w.-]*/[\w./-]+$} && !-e } split / /, $command;
    return $missing;
}

sub begin {
    my ($kind, $name, $seconds, $command) = @_;
    (my $base = "$out/$name") =~ s/[^\w.\/-]/_/g;
    make_path($base =~ s{/[^/]*$}{}r);
    unlink "$base.tap", "$base.log";
    $command .= " --tap=$base.tap" if $kind eq 'criterion';
    my $to = $kind eq 'tap' ? ">$base.tap 2>$base.log" : ">$base.log 2>&1";
    my $pid = fork // die "fork: $!\n";
    my $missing = missing_file($command);
    my $shell = $missing ? "echo $missing was not built >$base.log; exit 127"
        : "exec timeout -k 10 $seconds $command $to </dev/null";
    my @apart = $can_hide ? ('unshare', '--mount', 'sh', '-c', hide($kind) . ' && exec "$@"', 'sh') : ();
    exec @apart, 'sh', '-c', $shell or die "exec: $!\n" if $pid == 0;
    return ($pid, {kind => $kind, name => $name, base => $base, command => $command, began => time});
}

sub finish {
    my ($p, $wait, $cpu) = @_;
    my $r = judge($p->{kind}, slurp("$p->{base}.tap"), $wait & 127 ? 128 + ($wait & 127) : $wait >> 8);
    my $counts = "$r->{passed} passed" . ($r->{failed} ? ", $r->{failed} failed" : '')
        . ($r->{skipped} ? ", $r->{skipped} skipped" : '');
    printf "%-6s %-34s %s (%.1f s, %.1f s of CPU)\n", $r->{failed} ? 'FAILED' : 'ok', $p->{name}, $counts,
        time - $p->{began}, $cpu;
    print "       $_\n" for @{$r->{why}};
    if ($r->{failed}) {
        my @lines = grep { !/^ok / } split /^/, slurp("$p->{base}.tap");
        print "----- $p->{command}\n", slurp("$p->{base}.log"), @lines, "-----\n";
    }
    return $r;
}

my %sum = (passed => 0, failed => 0, skipped => 0);
if ($built != 0) {
    printf "%-6s %-34s %s\n", 'FAILED', 'build', 'not everything compiles: see above';
    $sum{failed}++;
}
open my $list, '<', $ARGV[0] or die "$ARGV[0]: $!\n";
chomp(my @lines = <$list>);
my ($began, $cpu, %running) = (time, 0);
while (@lines || %running) {
    while (@lines && keys %running < $jobs) {
        my ($pid, $program) = begin(split / /, shift @lines, 4);
        $running{$pid} = $program;
    }
    my $pid = wait;
    my $program = delete $running{$pid} or next;
    # What the children that ended have used: the difference is what this one has.
    my (undef, undef, $user, $system) = times;
    my $r = finish($program, $?, $user + $system - $cpu);
    $cpu = $user + $system;
    $sum{$_} += $r->{$_} for keys %sum;
}
printf "%.0f s, %.0f s of CPU\n", time - $began, $cpu;
my $summary = "$sum{passed} passed, $sum{failed} failed" . ($sum{skipped} ? ", $sum{skipped} skipped" : '') . "\n";
open my $file, '>', "$out/summary" or die "$out/summary: $!\n";
print $file $summary;
close $file or die "$out/summary: $!\n";
print $summary;
exit($sum{failed} == 0 ? 0 : 1);
