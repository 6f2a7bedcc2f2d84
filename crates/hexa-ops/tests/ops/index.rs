//! The expert index: a stable sort of the slots.

use burn::tensor::{Int, Tensor, TensorData};
use hexa_ops::host::upload;
use hexa_ops::testing::oracle::Routing;
use hexa_ops::{ExpertIndex, ExpertKernels, TrainingBackend, backend_test};
use proptest::prelude::*;

use crate::cases::{
    CASES, Numbers, Outcome, RoutingCase, Spread, check, expert_ids, integers, most_tokens,
    routing_case,
};

fn compare<B: TrainingBackend>(index: &ExpertIndex<B>, routing: &Routing) -> Outcome {
    let slots = integers(index.slots());
    let positions = integers(index.positions());
    let counts = integers(index.counts());
    prop_assert_eq!(index.num_slots(), routing.num_slots());
    prop_assert_eq!(counts.iter().sum::<usize>(), routing.num_slots());
    for (position, &slot) in slots.iter().enumerate() {
        prop_assert_eq!(positions[slot], position, "positions invert slots");
    }
    for pair in slots.windows(2) {
        let key = |s: usize| (routing.expert_ids[s], s);
        prop_assert!(
            key(pair[0]) < key(pair[1]),
            "sorted by expert, then by slot"
        );
    }
    prop_assert_eq!(counts, routing.counts());
    prop_assert_eq!(integers(index.offsets()), routing.offsets());
    prop_assert_eq!(slots, routing.slots());
    prop_assert_eq!(positions, routing.positions());
    Ok(())
}

fn stable_permutation<B: TrainingBackend>() {
    check(CASES, routing_case(most_tokens()), |case| {
        let routing = case.routing();
        let index = ExpertIndex::<B>::new(expert_ids(&routing), routing.num_experts)?;
        compare(&index, &routing)
    });
}

fn large<B: TrainingBackend>() {
    for (tokens, top_k, num_experts, spread) in [
        (5003, 3, 64, Spread::Free),
        (4099, 1, 1, Spread::One),
        (2048, 2, 300, Spread::Distinct),
        (1031, 1, 1024, Spread::Even),
        (3001, 2, 7, Spread::One),
    ] {
        let case = RoutingCase {
            tokens,
            top_k,
            num_experts,
            spread,
            seed: 7,
        };
        let routing = case.routing();
        let index = ExpertIndex::<B>::new(expert_ids(&routing), num_experts)
            .unwrap_or_else(|error| panic!("{case:?}: {error}"));
        compare(&index, &routing).unwrap_or_else(|error| panic!("{case:?}: {error}"));
    }
}

fn strided_ids<B: TrainingBackend>() {
    let (tokens, top_k, num_experts) = (29, 3, 5);
    let mut numbers = Numbers::new(3);
    // In memory `[top_k, tokens]`, so that the ids of a token are not neighbours.
    let stored: Vec<i32> = (0..tokens * top_k)
        .map(|_| numbers.below(num_experts) as i32)
        .collect();
    let ids = (0..tokens * top_k)
        .map(|slot| stored[slot % top_k * tokens + slot / top_k] as usize)
        .collect();
    let routing = Routing::new(tokens, top_k, num_experts, ids);
    let tensor = upload::<B, 2, Int>(
        TensorData::new(stored, [top_k, tokens]),
        &B::Device::default(),
    )
    .swap_dims(0, 1);
    let index = ExpertIndex::new(tensor, num_experts).unwrap();
    compare(&index, &routing).unwrap();
}

fn two_builds_are_equal<B: TrainingBackend>() {
    check(32, routing_case(most_tokens()), |case| {
        let routing = case.routing();
        let ids = expert_ids::<B>(&routing);
        let a = ExpertIndex::new(ids.clone(), routing.num_experts)?;
        let b = ExpertIndex::new(ids, routing.num_experts)?;
        prop_assert_eq!(integers(a.slots()), integers(b.slots()));
        prop_assert_eq!(integers(a.positions()), integers(b.positions()));
        Ok(())
    });
}

/// Unchecked ids must not lead a kernel out of its memory.
fn wild_ids_are_clamped<K: ExpertKernels>() {
    let ids = vec![-5, 0, 99, 2, i32::MIN, i32::MAX];
    let tensor =
        Tensor::<K, 2, Int>::from_data(TensorData::new(ids, [3, 2]), &K::Device::default());
    let raw = <K as ExpertKernels>::expert_index(tensor.into_primitive(), 3);
    let routing = Routing::new(3, 2, 3, vec![0, 0, 2, 2, 0, 2]);
    let read = |t| integers(Tensor::<K, 1, Int>::from_primitive(t));
    assert_eq!(read(raw.counts), routing.counts());
    assert_eq!(read(raw.offsets), routing.offsets());
    assert_eq!(read(raw.slots), routing.slots());
    assert_eq!(read(raw.positions), routing.positions());
}

backend_test!(index_is_a_stable_permutation, stable_permutation);
backend_test!(index_of_many_slots_and_experts, large);
backend_test!(index_of_strided_ids, strided_ids);
backend_test!(index_is_deterministic, two_builds_are_equal);
backend_test!(kernels index_clamps_wild_ids, wild_ids_are_clamped);
