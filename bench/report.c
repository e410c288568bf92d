/* Turns lines "name value unit" on standard input into a table on standard output and a JSON array in a file. Lines
   that begin with # are comments.

   report FILE.json              objects {"name", "value", "unit"}
   report FILE.json LIMITS       objects {"name", "value", "limit", "unit"}, and the table is in TAP: a test for each.
                                 Lines of LIMITS: "name max|min limit". A value without a limit fails, and a limit
                                 without a value. */
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LIMITS_MAX 200

struct limit {
    char name[200];
    bool least; // value must be at least that, otherwise at most
    double limit;
    bool seen;
};

static struct limit limits[LIMITS_MAX];
static size_t limit_count;

static bool is_blank(const char *line) { return line[0] == '#' || line[0] == '\n'; }

static int read_limits(const char *path) {
    FILE *f = fopen(path, "r");
    char line[512];
    while (f != NULL && fgets(line, sizeof line, f) != NULL && limit_count < LIMITS_MAX) {
        struct limit *l = &limits[limit_count];
        char kind[8], number[64], *end = NULL;
        if (is_blank(line))
            continue;
        bool good = sscanf(line, "%199s %7s %63s", l->name, kind, number) == 3 &&
                    (strcmp(kind, "max") == 0 || strcmp(kind, "min") == 0);
        l->least = good && kind[1] == 'i';
        l->limit = good ? strtod(number, &end) : 0;
        if (!good || *end != '\0') {
            fprintf(stderr, "report: %s: not \"name max|min limit\": %s", path, line);
            return 1;
        }
        limit_count++;
    }
    if (f == NULL || limit_count == 0 || !feof(f)) {
        fprintf(stderr, "report: %s: cannot be read, or has none or more than %d limits\n", path, LIMITS_MAX);
        return 1;
    }
    return fclose(f);
}

static struct limit *find_limit(const char *name) {
    for (size_t i = 0; i < limit_count; i++)
        if (strcmp(limits[i].name, name) == 0)
            return &limits[i];
    return NULL;
}

/* One line of TAP. False: beyond its limit. */
static bool judge(size_t n, const char *name, double value, const char *unit, json_t *object) {
    struct limit *l = find_limit(name);
    if (l == NULL) {
        printf("not ok %zu - %s %.6g %s: has no limit\n", n, name, value, unit);
        return false;
    }
    bool good = l->least ? value >= l->limit : value <= l->limit;
    l->seen = true;
    json_object_set_new(object, "limit", json_real(l->limit));
    printf("%s %zu - %s %.8g, at %s %.8g, %s\n", good ? "ok" : "not ok", n, name, value, l->least ? "least" : "most",
           l->limit, unit);
    return good;
}

static bool missing(size_t *n) {
    bool any = false;
    for (size_t i = 0; i < limit_count; i++) {
        if (limits[i].seen)
            continue;
        printf("not ok %zu - %s was not measured\n", ++*n, limits[i].name);
        any = true;
    }
    return any;
}

int main(int argc, char **argv) {
    bool judging = argc == 3, good = true;
    if (argc < 2 || argc > 3 || (judging && read_limits(argv[2]) != 0)) {
        fprintf(stderr, "usage: report FILE.json [LIMITS] < LINES\n");
        return 2;
    }
    json_t *all = json_array();
    char line[512];
    size_t n = 0;
    while (fgets(line, sizeof line, stdin) != NULL) {
        char name[200], number[64], unit[64], *end = NULL;
        if (is_blank(line))
            continue;
        int fields = sscanf(line, "%199s %63s %63[^\n]", name, number, unit);
        double value = fields == 3 ? strtod(number, &end) : 0;
        if (fields != 3 || *end != '\0') {
            fprintf(stderr, "report: not \"name value unit\": %s", line);
            return 1;
        }
        json_t *object = json_pack("{s:s, s:f, s:s}", "name", name, "value", value, "unit", unit);
        n++;
        if (judging)
            good = judge(n, name, value, unit, object) && good;
        else
            printf("%-48s %14.6g  %s\n", name, value, unit);
        json_array_append_new(all, object);
    }
    good = !missing(&n) && good;
    if (judging)
        printf("1..%zu\n", n);
    if (json_array_size(all) == 0 || json_dump_file(all, argv[1], JSON_INDENT(2) | JSON_REAL_PRECISION(8)) != 0) {
        fprintf(stderr, "report: nothing read, or %s cannot be written\n", argv[1]);
        return 1;
    }
    json_decref(all);
    return good ? 0 : 1;
}
