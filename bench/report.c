/* Turns lines "name value unit" on standard input into a table on standard output and an array of {"name", "value",
   "unit"} in a file: report build/bench.json. Lines that begin with # are comments. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: report FILE.json < LINES\n");
        return 2;
    }
    json_t *all = json_array();
    char line[512];
    while (fgets(line, sizeof line, stdin) != NULL) {
        char name[200], number[64], unit[64], *end = NULL;
        if (line[0] == '#' || line[0] == '\n')
            continue;
        int fields = sscanf(line, "%199s %63s %63[^\n]", name, number, unit);
        double value = fields == 3 ? strtod(number, &end) : 0;
        if (fields != 3 || *end != '\0') {
            fprintf(stderr, "report: not \"name value unit\": %s", line);
            return 1;
        }
        printf("%-48s %14.6g  %s\n", name, value, unit);
        json_array_append_new(all, json_pack("{s:s, s:f, s:s}", "name", name, "value", value, "unit", unit));
    }
    if (json_array_size(all) == 0 || json_dump_file(all, argv[1], JSON_INDENT(2) | JSON_REAL_PRECISION(8)) != 0) {
        fprintf(stderr, "report: nothing read, or %s cannot be written\n", argv[1]);
        return 1;
    }
    json_decref(all);
    return 0;
}
