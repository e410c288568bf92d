#!/usr/bin/env perl
# qmp.pl [--timeout SECONDS] SOCKET COMMAND [ARGUMENTS]      runs a QMP command, prints its answer as JSON
# qmp.pl [--timeout SECONDS] SOCKET wait                     until query-migrate says completed, failed or cancelled:
#                                                            prints that word
# qmp.pl [--timeout SECONDS] SOCKET until COMMAND FIELD VALUE...
#                                                            repeats a command until a field of its answer has one of
#                                                            the values; prints the value
# ARGUMENTS are a JSON object. The default deadline is 60 seconds, for all of it; a socket that is not there yet is
# waited for. Exit status: 0; 1: QEMU refused, or the migration failed (the reason is on stderr); 2: misused, or too
# late, or QEMU is gone.
use strict;
use warnings;
use IO::Select;
use IO::Socket::UNIX;
use JSON::PP;
use Time::HiRes qw(sleep time);

my $json    = JSON::PP->new->canonical->allow_nonref;
my $buffer  = '';
my $id      = 0;
my $seconds = 60;
my ($deadline, $path, $socket);

sub give_up { my ($why) = @_; print STDERR "qmp.pl: $path: $why\n"; exit 2; }

sub usage {
    print STDERR "usage: qmp.pl [--timeout SECONDS] SOCKET COMMAND [ARGUMENTS] | SOCKET wait"
        . " | SOCKET until COMMAND FIELD VALUE...\n";
    exit 2;
}

sub open_socket {
    while (!($socket = IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $path))) {
        give_up("cannot connect within $seconds s: $!") if time >= $deadline;
        sleep 0.05;
    }
    return;
}

# The next message, an object.
sub next_message {
    my $select = IO::Select->new($socket);
    while (index($buffer, "\n") < 0) {
        my $left = $deadline - time;
        give_up("no answer within $seconds s") if $left <= 0 || !$select->can_read($left);
        my $got = sysread $socket, $buffer, 65536, length $buffer;
        give_up('QEMU closed the connection') if !$got;
    }
    my $line = substr $buffer, 0, index($buffer, "\n") + 1, '';
    my $message = eval { $json->decode($line) };
    give_up("not JSON: $line") if ref $message ne 'HASH';
    return $message;
}

# The answer to a command: an object with "return" or "error". Events in between are left out.
sub ask {
    my ($command, $arguments) = @_;
    my $request = { execute => $command, id => ++$id };
    $request->{arguments} = $arguments if defined $arguments;
    local $SIG{PIPE} = 'IGNORE';
    my $line = $json->encode($request) . "\n";
    give_up("cannot send: $!") if (syswrite($socket, $line) // -1) != length $line;
    while (1) {
        my $answer = next_message();
        return $answer if defined $answer->{id} && $answer->{id} eq $id;
    }
}

sub ask_well {
    my ($command, $arguments) = @_;
    my $answer = ask($command, $arguments);
    return $answer->{return} if exists $answer->{return};
    print STDERR "qmp.pl: $command: $answer->{error}{desc}\n";
    exit 1;
}

sub until_field {
    my ($command, $field, @values) = @_;
    my $last = 'nothing';
    while (1) {
        my $answer = ask_well($command);
        $last = $answer->{$field} // 'nothing' if ref $answer eq 'HASH';
        return ($last, $answer) if grep { $_ eq $last } @values;
        give_up("$command says $field \"$last\" after $seconds s; waited for " . join ' or ', @values)
            if time >= $deadline;
        sleep 0.1;
    }
}

if (@ARGV && $ARGV[0] eq '--timeout') {
    (undef, $seconds) = splice @ARGV, 0, 2;
    usage() if ($seconds // '') !~ /^\d+(\.\d+)?$/;
}
usage() if @ARGV < 2;
($path, my ($command, @rest)) = @ARGV;
my $arguments;
if ($command eq 'until') {
    usage() if @rest < 3;
} elsif ($command eq 'wait') {
    usage() if @rest;
} elsif (@rest) {
    $arguments = eval { $json->decode($rest[0]) };
    usage() if @rest > 1 || ref $arguments ne 'HASH';
}

$deadline = time + $seconds;
open_socket();
next_message();
ask_well('qmp_capabilities');
if ($command eq 'wait') {
    my ($status, $answer) = until_field('query-migrate', 'status', qw(completed failed cancelled));
    print "$status\n";
    exit 0 if $status eq 'completed';
    print STDERR 'qmp.pl: ', $answer->{'error-desc'} // 'no reason given', "\n";
    exit 1;
}
if ($command eq 'until') {
    my ($value) = until_field(@rest);
    print "$value\n";
    exit 0;
}
print $json->encode(ask_well($command, $arguments)), "\n";
