/*
open_fabric.h - opens a fabric by its name, for programs that let their user choose

    #define RMIG_IMPLEMENTATION
    #include "../rmig.h"
    #include "open_fabric.h"

Link with -lfabric, and with -lrdmacm -libverbs unless WITHOUT_VERBS is defined.
*/
#ifndef OPEN_FABRIC_H
#define OPEN_FABRIC_H

#include <string.h>

#include "../rmig_fabric_ofi.h"
#ifndef WITHOUT_VERBS
#include "../rmig_fabric_verbs.h"
#define OPEN_FABRIC_NAMES "ofi, verbs"
#else
#define OPEN_FABRIC_NAMES "ofi"
#endif

static inline struct rmig_fabric *open_fabric_verbs(const char *device, struct rmig_error *err) {
#ifdef WITHOUT_VERBS
    (void)device;
    rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "this program was built without verbs; it has: " OPEN_FABRIC_NAMES);
    return NULL;
#else
    struct rmig_verbs_options options;
    memset(&options, 0, sizeof options);
    options.device = device;
    return rmig_verbs_open(&options, err);
#endif
}

/* name: "ofi" (libfabric), "verbs", or NULL: ofi, which runs everywhere. provider: libfabric's provider, or the name of
   a verbs device; NULL: the first that can do it. Returns NULL with *err filled in. */
static inline struct rmig_fabric *open_fabric(const char *name, const char *provider, struct rmig_error *err) {
    if (name != NULL && strcmp(name, "verbs") == 0)
        return open_fabric_verbs(provider, err);
    if (name != NULL && strcmp(name, "ofi") != 0) {
        rmig_fail(err, RMIG_ERR_ARGUMENT, 0, "fabric \"%.60s\" is not known; it must be one of: " OPEN_FABRIC_NAMES,
                  name);
        return NULL;
    }
    struct rmig_ofi_options options;
    memset(&options, 0, sizeof options);
    options.provider = provider;
    return rmig_ofi_open(&options, err);
}

/* For reports: libfabric's provider; "" where there is no such thing. */
static inline const char *fabric_provider(const struct rmig_fabric *fabric) {
    return fabric != NULL && strcmp(fabric->ops->name, "ofi") == 0 ? rmig_ofi_provider(fabric) : "";
}

#endif
