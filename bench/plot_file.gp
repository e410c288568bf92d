# Speed of saving and loading:
# gnuplot -e "data='build/bench-file.dat'; out='build/bench-file'; ram='4096 MiB'" bench/plot_file.gp
set style data histogram
set style histogram clustered gap 1
set style fill solid noborder
set ylabel "GB/s of what is not zero"
set yrange [0:*]
set xtics nomirror
set grid ytics
set key outside top center horizontal
set bmargin 5
set title ram." of RAM, half of it zero: saved until it is on the disk, loaded into fresh memory"
plot_all = 'set output out.ext; plot \
  data using ($2 / 1e9):xtic(1) title "save" lc rgb "#d95f02", \
  data using ($3 / 1e9) title "load" lc rgb "#1b9e77"'
set terminal pngcairo size 1000, 560
ext = ".png"
eval(plot_all)
set terminal svg size 1000, 560 background rgb "white"
ext = ".svg"
eval(plot_all)
