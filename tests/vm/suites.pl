#!/usr/bin/env perl
# suites.pl CODENAME "SUITE..." FOLDER FILE...: apt's sources for these suites, made from the sources of CODENAME in the
# files: the same places, keys and options, other suites. One-line (.list) and deb822 (.sources) files.
use strict;
use warnings;

my ($codename, $suites, $folder, @files) = @ARGV;
die "usage: suites.pl CODENAME \"SUITE...\" FOLDER FILE...\n" if !defined $folder;
my (%lines, %stanzas);

sub is_base { my ($suite) = @_; return $suite eq $codename || $suite =~ /^(old)*stable$/; }

sub one_line {
    my ($text) = @_;
    for (split /\n/, $text) {
        my ($options, $place, $suite, $rest) = /^\s*deb\s+(\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+(\S[^#]*)/ or next;
        next if !is_base($suite);
        $lines{ 'deb ' . ($options // '') . "$place $_ $rest" } = 1 for split ' ', $suites;
    }
    return;
}

# A field goes on over lines that begin with a space.
sub deb822 {
    my ($text) = @_;
    $text =~ s/^#.*\n//mg;
    for my $stanza (split /\n\s*\n/, $text) {
        next if $stanza !~ /^Types:.*\bdeb\b(?!-)/mi || $stanza =~ /^Enabled:\s*no\b/mi;
        my ($own) = $stanza =~ /^Suites:((?:.*)(?:\n[ \t].*)*)/mi or next;
        next if !grep { is_base($_) } split ' ', $own;
        $stanza =~ s/^Suites:.*(?:\n[ \t].*)*/Suites: $suites/mi;
        $stanza =~ s/^Types:.*(?:\n[ \t].*)*/Types: deb/mi;
        $stanza =~ s/\n+\z//;
        $stanzas{"$stanza\n"} = 1;
    }
    return;
}

sub save {
    my ($name, $text) = @_;
    return if $text eq '';
    open my $out, '>', "$folder/$name" or die "$folder/$name: $!\n";
    print $out $text or die "$folder/$name: $!\n";
    close $out or die "$folder/$name: $!\n";
    return;
}

for my $file (@files) {
    open my $in, '<', $file or die "$file: $!\n";
    my $text = do { local $/; <$in> } // '';
    if   ($file =~ /\.sources$/) { deb822($text) }
    else                         { one_line($text) }
}
die "no source of $codename is in apt's files: " . (join(', ', @files) || 'there is none') . "\n"
    if !%lines && !%stanzas;
save('derived.list',    join '', map { "$_\n" } sort keys %lines);
save('derived.sources', join "\n", sort keys %stanzas);
