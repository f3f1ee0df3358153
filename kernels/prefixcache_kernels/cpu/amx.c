/* The permission to use the processor's matrices; see `amx.h`. */
#include "amx.h"

int64_t prefixcache_amx = 0;

#ifdef PREFIXCACHE_AMX

#include <sys/syscall.h>
#include <unistd.h>

enum { ASK = 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILES = 18 /* XFEATURE_XTILEDATA */ };

__attribute__((constructor)) static void ask(void) {
    prefixcache_amx = syscall(SYS_arch_prctl, ASK, TILES) == 0;
}

#endif
