# The figure of README.md: seconds for 8 GiB over the chunk size, from the table of bench/sim.c. No tool is needed but awk,
# and the same table gives the same bytes.   awk -f bench/figure.awk TABLE >FIGURE.svg
function x(mib) { return 70 + log(mib) / log(1024) * 760 }
function y(seconds) { return 500 - log(seconds / 0.5) / log(120) * 440 }
function text(px, py, anchor, words) {
    printf "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", px, py, anchor, words
}
function line(x1, y1, x2, y2, style) {
    printf "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2, y2, style
}
function curve(column, colour, dashes, name, at,   i, points) {
    for (i = 1; i <= rows; i++)
        points = points sprintf("%.1f,%.1f ", x(cell[i, 1]), y(cell[i, column]))
    style = "stroke=\"" colour "\" stroke-width=\"2\"" (dashes == "" ? "" : " stroke-dasharray=\"" dashes "\"")
    printf "<polyline fill=\"none\" %s points=\"%s\"/>\n", style, points
    line(560, 80 + 22 * at, 600, 80 + 22 * at, style)
    text(550, 84 + 22 * at, "end", name)
}
{ rows = NR; for (i = 1; i <= NF; i++) cell[NR, i] = $i }
END {
    print "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"900\" height=\"560\" viewBox=\"0 0 900 560\""
    print "font-family=\"sans-serif\" font-size=\"13\">"
    print "<rect width=\"900\" height=\"560\" fill=\"white\"/>"
    text(450, 30, "middle", "8 GiB at 100 Gb/s, 5 us round trip (simulator)")
    grid = "stroke=\"#cccccc\" stroke-width=\"0.5\""
    for (i = 1; i <= rows; i++) {
        line(x(cell[i, 1]), 60, x(cell[i, 1]), 500, grid)
        text(x(cell[i, 1]), 520, "middle", cell[i, 1])
    }
    n = split("0.5 1 2 5 10 20 50", tick, " ")
    for (i = 1; i <= n; i++) {
        line(70, y(tick[i]), 830, y(tick[i]), grid)
        text(62, y(tick[i]) + 4, "end", tick[i])
    }
    text(450, 545, "middle", "chunk size, MiB")
    print "<text transform=\"translate(22,280) rotate(-90)\" text-anchor=\"middle\">seconds for 8 GiB</text>"
    curve(2, "#d95f02", "", "one chunk at a time, 100 us + 80 us/MiB", 0)
    curve(4, "#d95f02", "7,4", "one chunk at a time, 2 ms + 40 us/MiB", 1)
    curve(3, "#1b9e77", "", "rmig, 100 us + 80 us/MiB", 2)
    curve(5, "#1b9e77", "7,4", "rmig, 2 ms + 40 us/MiB", 3)
    wire = 8 * 1024 * 1024 * 1024 / 12.5e9
    line(70, y(wire), 830, y(wire), "stroke=\"#666666\" stroke-dasharray=\"2,3\"")
    line(560, 168, 600, 168, "stroke=\"#666666\" stroke-dasharray=\"2,3\"")
    text(550, 172, "end", "the wire alone")
    print "</svg>"
}
