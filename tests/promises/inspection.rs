//! Whoever looks with bpftool sees named programs and maps whose fields have names.
use tests::{
    Stack, Verdicts,
    bpf::{self, MAP_TYPE_HASH, MAP_TYPE_LRU_HASH, Map},
};

#[test]
fn programs_and_maps_have_names() {
    let mut stack = Stack::start(Verdicts::Sockmap);
    let held = stack.look();
    assert!(!held.programs.is_empty() && !held.maps.is_empty());
    for program in held.programs {
        assert!(!bpf::program_name(program).unwrap().is_empty(), "program {program} has no name");
    }
    let mut typed = 0;
    for map in held.maps {
        let map = Map::by_id(map).unwrap();
        assert!(!map.name.is_empty(), "a map of kind {} has no name", map.kind);
        if [MAP_TYPE_HASH, MAP_TYPE_LRU_HASH].contains(&map.kind) {
            assert!(map.has_types, "the fields of {} have no names", map.name);
            typed += 1;
        }
    }
    assert!(typed > 0, "there is a map of connections");
}
