#!/usr/bin/env perl
# ram_image.pl FILE [SIZE-MIB [DATA-MIB [SEED]]]: an image of a VM's RAM, 64 MiB with 8 MiB of data unless told.
# Half of the data is in runs of 2 to 256 pages, half in single pages scattered over all of it; no two pages of data are
# alike, the rest is a hole (zero). The same seed gives the same image.
use strict;
use warnings;
use constant PAGE => 4096;

my ($file, $size, $data, $seed) = @ARGV;
die "usage: ram_image.pl FILE [SIZE-MIB [DATA-MIB [SEED]]]\n" if !defined $file || @ARGV > 4;
$size //= 64;
$data //= 8;
$seed //= 1;
for ($size, $data, $seed) { die "\"$_\" is not a number\n" if !/^\d{1,6}$/; }
die "$data MiB of data do not fit in half of $size MiB\n" if $data * 2 > $size;
srand $seed;
my $pages = $size * 256;
my $base  = pack 'L*', map { int rand 2**32 } 1 .. PAGE / 4;
my %used;

# A page of its own: the base, moved, with 8 random bytes over all of it and its number in it.
sub content {
    my ($number) = @_;
    my $at = int rand PAGE;
    my $page = substr($base, $at) . substr($base, 0, $at);
    $page ^= pack('LL', int rand 2**32, int rand 2**32) x (PAGE / 8);
    substr $page, int(rand PAGE / 8) * 8, 8, pack('LL', $number, 0x676d6972);
    return $page;
}

open my $out, '>', $file or die "$file: $!\n";
binmode $out;
truncate $out, $size << 20 or die "$file: $!\n";
my $wanted = $data * 256;
while (keys %used < $wanted) {
    my $length = keys %used < $wanted / 2 ? 2 + int rand 255 : 1;
    my $first  = int rand $pages;
    for my $page ($first .. $first + $length - 1) {
        next if $page >= $pages || $used{$page} || keys %used == $wanted;
        $used{$page} = 1;
        sysseek $out, $page * PAGE, 0 or die "$file: $!\n";
        (syswrite($out, content($page)) // 0) == PAGE or die "$file: $!\n";
    }
}
close $out or die "$file: $!\n";
