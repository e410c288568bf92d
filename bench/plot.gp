# Total time against chunk size in the simulator: gnuplot -e "data='build/bench_sim.dat'; out='build/bench'" bench/plot.gp
set style data linespoints
set logscale xy
set xlabel "chunk size, MiB"
set ylabel "seconds for 8 GiB"
set xtics (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
set yrange [0.5:60]
set ytics (0.5, 1, 2, 5, 10, 20, 50)
set grid
set key top right
set title "8 GiB at 100 Gb/s, 5 us round trip (simulator)"
plot_all = 'set output out.ext; plot \
  data using 1:2 title "one chunk at a time, 100 us + 80 us/MiB" lc rgb "#d95f02" pt 6, \
  data using 1:3 title "rmig, 100 us + 80 us/MiB" lc rgb "#1b9e77" pt 7, \
  data using 1:4 title "one chunk at a time, 2 ms + 40 us/MiB" lc rgb "#d95f02" dt 2 pt 4, \
  data using 1:5 title "rmig, 2 ms + 40 us/MiB" lc rgb "#1b9e77" dt 2 pt 5, \
  8.0 * 1024 * 1024 * 1024 / 12.5e9 title "the wire alone" with lines lc rgb "#666666" dt 3'
set terminal pngcairo size 900, 560
ext = ".png"
eval(plot_all)
set terminal svg size 900, 560 background rgb "white"
ext = ".svg"
eval(plot_all)
