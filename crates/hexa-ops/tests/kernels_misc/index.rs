//! The counting sort.

use burn::tensor::Tensor;
use hexa_ops::testing::oracle::Routing;
use hexa_ops::{ExpertKernels, backend_test};

use crate::{Numbers, int, ints};

fn check<K: ExpertKernels>(ids: &[usize], [tokens, top_k, num_experts]: [usize; 3]) {
    let expected = Routing::new(tokens, top_k, num_experts, ids.to_vec());
    let ids: Vec<i64> = ids.iter().map(|&id| id as i64).collect();
    let index = <K as ExpertKernels>::expert_index(
        int::<K, 2>(&ids, [tokens, top_k]).into_primitive(),
        num_experts,
    );
    let case = format!("{tokens} tokens, {top_k} of {num_experts}");
    assert_eq!(ints::<K, 1>(index.counts), expected.counts(), "{case}");
    assert_eq!(ints::<K, 1>(index.offsets), expected.offsets(), "{case}");
    assert_eq!(ints::<K, 1>(index.slots), expected.slots(), "{case}");
    assert_eq!(
        ints::<K, 1>(index.positions),
        expected.positions(),
        "{case}"
    );
}

fn random_ids<K: ExpertKernels>() {
    let mut numbers = Numbers(1);
    for shape @ [tokens, top_k, num_experts] in [
        [1, 1, 1],
        [1, 1, 7],
        [5, 3, 3],
        [37, 2, 5],
        [128, 2, 8],
        [257, 3, 11],
        [700, 2, 300],
    ] {
        let ids: Vec<usize> = (0..tokens * top_k)
            .map(|_| numbers.below(num_experts))
            .collect();
        check::<K>(&ids, shape);
    }
}
backend_test!(kernels random_ids_are_sorted_stably, random_ids);

fn lopsided<K: ExpertKernels>() {
    check::<K>(&[4; 513], [513, 1, 6]);
    let two_of_five: Vec<usize> = (0..600).map(|slot| [1, 4][slot % 2]).collect();
    check::<K>(&two_of_five, [300, 2, 5]);
}
backend_test!(kernels experts_may_be_without_slots, lopsided);

fn no_tokens<K: ExpertKernels>() {
    check::<K>(&[], [0, 2, 3]);
}
backend_test!(kernels no_tokens_give_zero_counts, no_tokens);

fn out_of_range<K: ExpertKernels>() {
    let ids = int::<K, 2>(
        &[-1, 9, 2, i64::from(i32::MIN), i64::from(i32::MAX), 0],
        [3, 2],
    );
    let index = <K as ExpertKernels>::expert_index(ids.into_primitive(), 3);
    assert_eq!(ints::<K, 1>(index.counts), [3, 0, 3]);
    assert_eq!(ints::<K, 1>(index.slots), [0, 3, 5, 1, 2, 4]);
}
backend_test!(kernels ids_out_of_range_are_clamped, out_of_range);

fn transposed<K: ExpertKernels>() {
    let ids = int::<K, 2>(&[0, 2, 1, 1, 2, 0], [2, 3]).transpose();
    let again: Tensor<K, 2, burn::tensor::Int> = int(&[0, 1, 2, 2, 1, 0], [3, 2]);
    let of_view = <K as ExpertKernels>::expert_index(ids.into_primitive(), 3);
    let of_copy = <K as ExpertKernels>::expert_index(again.into_primitive(), 3);
    assert_eq!(ints::<K, 1>(of_view.slots), ints::<K, 1>(of_copy.slots));
}
backend_test!(kernels ids_may_have_any_strides, transposed);
