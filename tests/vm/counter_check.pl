#!/usr/bin/env perl
# counter_check.pl FILE: looks at the RAM of counter_guest.S in an image of it, taken while the guest stood still.
# Prints "pass N page K": N passes are done, the guest is about to count page K. Exit status 1: a page does not hold
# what it must (the message says which); 2: the guest has not run, or the file cannot be read.
use strict;
use warnings;
use constant { PAGE => 4096, BASE => 0x1000000, COUNT => 4096, MAGIC => 0x474d4952 };

sub unfit { print STDERR "counter_check.pl: @_\n"; exit 2; }

my ($file) = @ARGV;
unfit('usage: counter_check.pl FILE') if @ARGV != 1;
open my $in, '<:raw', $file or unfit("$file: $!");
seek $in, BASE - PAGE, 0 or unfit("$file: $!");
my $length = (1 + COUNT) * PAGE;
my $ram    = '';
my $got    = read $in, $ram, $length;
unfit("$file is too short for the guest's pages: " . (-s $file) . ' bytes') if ($got // 0) != $length;
my ($pass, $magic) = unpack 'VV', $ram;
unfit("$file: the guest has not run: no mark where it leaves one") if $magic != MAGIC;
my @counter = map { unpack 'V', substr $ram, $_ * PAGE, 4 } 1 .. COUNT;

# The guest may stand between the last page and the pass counter: then all pages hold one more.
my $at = 0;
$at++ while $at < COUNT && $counter[$at] == $pass + 1;
my @wrong = grep { $counter[$_] != $pass } $at .. COUNT - 1;
if (@wrong) {
    my $first = $wrong[0];
    print STDERR "counter_check.pl: $file: pass $pass; the first $at pages hold ", $pass + 1, '; then ', scalar @wrong,
        " pages do not hold $pass, the first is page $first with $counter[$first]\n";
    exit 1;
}
print "pass $pass page $at\n";
